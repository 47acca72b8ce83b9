"""AdapterTemplates: the chat templates that adapters bring along, checked once for each adapter."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from ovms_lora.core.errors import AdapterError, AdapterErrorCode, ModelFolderError
from ovms_lora.core.request import HostAdapter
from ovms_lora.engine.chat import ChatTemplate
from ovms_lora.engine.template_process import FOR_ADAPTERS


class AdapterTemplates:
    """Templates live as long as their adapters. Safe from several threads."""

    def __init__(self) -> None:
        self._templates: WeakKeyDictionary[HostAdapter, ChatTemplate] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, adapter: HostAdapter) -> ChatTemplate | None:
        """Return an adapter's own template, None when it has none. Raises AdapterError for one that is none."""
        if adapter.chat_template is None:
            return None
        with self._lock:
            template = self._templates.get(adapter)
        if template is None:
            try:
                template = ChatTemplate(adapter.chat_template, processes=FOR_ADAPTERS)
            except ModelFolderError as error:
                raise AdapterError(AdapterErrorCode.CONFIG_INVALID, error.message) from error
            with self._lock:
                self._templates[adapter] = template
        return template
