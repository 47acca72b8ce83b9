"""LLM on a fake device: order, bounds, errors before anything runs, interrupts, threads, the end."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ovms_lora
from ovms_lora import LLM, LoRARequest, RequestOutput, SamplingParams
from ovms_lora.core.errors import ArgumentError, EngineError, ModelFolderError, UnavailableError
from ovms_lora.engine.model import GenerationDefaults
from ovms_lora.offline.prompts import PromptType
from tests.engine.harness import eventually
from tests.fakes import FakeRunner
from tests.offline.fake_llm import FakeRuntime, adapter, build_llm, fake_llm

GREEDY = SamplingParams(temperature=0, max_tokens=8)


def texts(outputs: Sequence[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


class InterruptingBar:
    """A progress bar during which someone presses Ctrl-C."""

    def __init__(self, **_: Any) -> None:
        self.postfix = ""

    def update(self, count: int) -> None:
        raise KeyboardInterrupt

    def close(self) -> None:
        pass


# The package


def test_the_names_of_the_package_are_the_python_api() -> None:
    names = {"LLM", "LoRARequest", "SamplingParams", "RequestOutput", "CompletionOutput", "Logprob", "__version__"}
    assert set(ovms_lora.__all__) == names
    assert all(getattr(ovms_lora, name) for name in names)
    assert names <= set(dir(ovms_lora))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ovms_lora.Nothing


def test_the_package_loads_nothing_until_a_name_is_used() -> None:
    program = (
        "import sys, ovms_lora\n"
        "from ovms_lora import SamplingParams\n"
        "print(*sorted(set(sys.modules) & {'openvino', 'numpy', 'pydantic', 'tqdm', 'torch'}))\n"
        "from ovms_lora import LLM\n"
        "print(*sorted(set(sys.modules) & {'torch', 'transformers', 'peft', 'fastapi'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("enable_lora", False),
        ("max_loras", 8),
        ("max_lora_rank", 64),
        ("max_cpu_loras", 64),
        ("total_rank", "auto"),
        ("lora_dtype", "auto"),
        ("enable_prefix_caching", None),
        ("max_num_seqs", None),
        ("max_num_batched_tokens", None),
        ("cache_size", None),
        ("plugin_config", None),
        ("speculative_config", None),
        ("device", None),
    ],
)
def test_the_settings_of_an_llm_have_their_defaults(name: str, default: Any) -> None:
    assert inspect.signature(LLM).parameters[name].default == default


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_loras": 0}, "max_loras: "),
        ({"max_lora_rank": 257}, "max_lora_rank: "),
        ({"lora_dtype": "f16"}, "lora_dtype: "),
        ({"total_rank": -1}, "total_rank: "),
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number of at least 1, got 0"),
        ({"max_num_batched_tokens": 2.5}, "max_num_batched_tokens must be a whole number of at least 1, got 2.5"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config: num_speculative_tokens: is missing"),
        ({"cache_size": -1}, "cache_size must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_value_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        LLM("a-model", enable_lora=True, **settings)


def test_an_llm_that_guesses_ahead_answers_the_same() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    texts = []
    for guessing in (None, config):
        with fake_llm(speculative_config=guessing) as llm:
            texts.append([answer.outputs[0].text for answer in llm.generate(["one", "two"], sampling)])
    assert texts[0] == texts[1]


def test_an_unknown_setting_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="tensor_parallel_size"):
        LLM("a-model", tensor_parallel_size=2)  # type: ignore[call-arg]


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelFolderError, match="no-such-model is not a folder"):
        LLM("no-such-model")


def test_settings_reach_the_engine() -> None:
    with fake_llm(max_num_seqs=3, enable_prefix_caching=False, plugin_config={"A": 1}, device="GPU") as llm:
        options = llm._loaded.options
    assert (options.max_num_seqs, options.enable_prefix_caching, options.device) == (3, False, "GPU")
    assert options.plugin_config == {"A": 1}
    assert options.max_num_batched_tokens == 256


# Order and shapes


def test_answers_come_in_the_order_of_the_prompts() -> None:
    prompts = [f"prompt {number}" for number in range(20)]
    sampling = [SamplingParams(temperature=0, max_tokens=20 - number) for number in range(20)]
    with fake_llm(max_num_seqs=7) as llm:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        alone = [llm.generate(*each, use_tqdm=False)[0] for each in zip(prompts, sampling, strict=True)]
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(20, 0, -1))
    assert texts(outputs) == texts(alone)


def test_an_output_has_what_vllms_has() -> None:
    prompts: list[PromptType] = ["hello", [104, 105]]
    with fake_llm() as llm:
        first, second = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert (first.request_id, first.prompt, first.prompt_token_ids) == ("0", "hello", list(b"hello"))
    assert (first.finished, first.lora_request, first.num_cached_tokens) == (True, None, 0)
    assert first.prompt_logprobs is None
    (completion,) = first.outputs
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert completion.text == bytes(completion.token_ids).decode()
    assert (completion.cumulative_logprob, completion.logprobs) == (None, None)
    assert completion.finished()
    assert (second.request_id, second.prompt, second.prompt_token_ids) == ("1", None, [104, 105])


def test_logprobs_are_maps_from_token_ids() -> None:
    with fake_llm() as llm:
        sampling = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1)
        (output,) = llm.generate("hello", sampling, use_tqdm=False)
    (completion,) = output.outputs
    assert completion.logprobs is not None
    assert completion.cumulative_logprob is not None
    chosen = [found[token] for found, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(each.logprob for each in chosen))
    assert [each.rank for each in chosen] == [1, 1, 1]
    assert "".join(each.decoded_token or "" for each in chosen) == completion.text
    assert [len(found) for found in completion.logprobs] == [2, 2, 2]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [ord("ello"[i]) in (found or {}) for i, found in enumerate(output.prompt_logprobs[1:])] == [True] * 4


def test_a_chosen_token_has_its_rank_also_beyond_the_alternatives() -> None:
    sampling = SamplingParams(temperature=2, seed=3, max_tokens=30, logprobs=1)
    with fake_llm() as llm:
        (output,) = llm.generate("hello", sampling, use_tqdm=False)
    (completion,) = output.outputs
    logprobs = completion.logprobs or []
    beyond = [found[token] for found, token in zip(logprobs, completion.token_ids, strict=True) if len(found) == 2]
    assert beyond, "no token but the most probable one was ever chosen"
    assert all(each.rank and each.rank > 1 for each in beyond)


def test_several_continuations_follow_the_seed() -> None:
    sampling = SamplingParams(n=4, seed=7, max_tokens=12)
    with fake_llm() as llm:
        first, second = (llm.generate("hello", sampling, use_tqdm=False)[0] for _ in range(2))
        (other,) = llm.generate("hello", SamplingParams(n=4, seed=8, max_tokens=12), use_tqdm=False)
    assert [completion.index for completion in first.outputs] == [0, 1, 2, 3]
    assert len({completion.text for completion in first.outputs}) == 4
    assert first.outputs == second.outputs
    assert first.outputs != other.outputs


def test_stop_strings_end_a_text() -> None:
    with fake_llm() as llm:
        (whole,) = llm.generate("hello", GREEDY, use_tqdm=False)
        stop = whole.outputs[0].text[3:5]
        (cut,) = llm.generate("hello", SamplingParams(temperature=0, stop=[stop]), use_tqdm=False)
    assert cut.outputs[0].text == whole.outputs[0].text.partition(stop)[0]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)


def test_no_prompts_have_no_answers() -> None:
    with fake_llm() as llm:
        assert llm.generate([], use_tqdm=False) == []
        assert llm.chat([], use_tqdm=False) == []


def test_the_prefix_cache_is_counted() -> None:
    with fake_llm() as llm:
        llm.generate("a prompt of some length", GREEDY, use_tqdm=False)
        (again,) = llm.generate("a prompt of some length", GREEDY, use_tqdm=False)
    assert again.num_cached_tokens
    assert again.num_cached_tokens >= 16


# Defaults


@pytest.mark.parametrize(
    ("model", "sampling"),
    [
        (GenerationDefaults(), SamplingParams()),
        (GenerationDefaults(do_sample=False, eos_token_ids=(3,)), SamplingParams()),
        (
            GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1),
            SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1),
        ),
        (GenerationDefaults(max_new_tokens=5), SamplingParams(max_tokens=5)),
    ],
)
def test_the_defaults_are_those_of_generation_config(model: GenerationDefaults, sampling: SamplingParams) -> None:
    with fake_llm(defaults=model) as llm:
        assert llm.get_default_sampling_params() == sampling
        (output,) = llm.generate("hello", use_tqdm=False)
    assert len(output.outputs[0].token_ids) == sampling.max_tokens


def test_params_of_a_call_are_taken_as_they_are() -> None:
    with fake_llm(defaults=GenerationDefaults(max_new_tokens=5)) as llm:
        (output,) = llm.generate("hello", SamplingParams(), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16


def test_the_models_length_ends_a_text_that_asks_for_more() -> None:
    with fake_llm(max_model_len=10) as llm:
        for wanted in (100, None):
            (output,) = llm.generate("hello", SamplingParams(temperature=0, max_tokens=wanted), use_tqdm=False)
            assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (5, "length")


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_params": [GREEDY]}, "The lengths of prompts and params must be the same."),
        ({"sampling_params": [GREEDY] * 3}, "The lengths of prompts and params must be the same."),
        ({"lora_request": [None]}, "The lengths of prompts and lora_request must be the same."),
        ({"sampling_params": {"n": 1}}, "params cannot be of type dict"),
        ({"sampling_params": [GREEDY, None]}, "params[1] cannot be of type NoneType"),
        ({"lora_request": "sql"}, "lora_request cannot be of type str"),
        ({"lora_request": [None, "sql"]}, "lora_request[1] cannot be of type str"),
        ({"prompts": ["ok", ""]}, "prompt 1: prompt is empty"),
        ({"prompts": ["ok", [1, 999]]}, "prompt 1: prompt holds a token id outside of 0 … 256"),
        ({"prompts": ["ok", "x" * 64]}, "prompt 1: Number of prompt tokens: 64 exceeds model max length: 64"),
        (
            {"sampling_params": SamplingParams(stop_token_ids=[999])},
            "prompt 0: stop_token_ids holds a token id outside",
        ),
        ({"sampling_params": SamplingParams(n=4097)}, "prompt 0: n must be at most 4096"),
    ],
)
def test_what_is_wrong_with_a_call_is_said_before_it_runs(arguments: dict[str, Any], message: str) -> None:
    runner = FakeRunner()
    with fake_llm(runner, enable_lora=True) as llm:
        with pytest.raises(ArgumentError) as refused:
            llm.generate(**{"prompts": ["one", "two"], "use_tqdm": False, **arguments})
        assert str(refused.value).startswith(message)
        assert isinstance(refused.value, ValueError)
        assert not runner.steps


def test_a_failed_step_fails_its_call_only() -> None:
    runner = FakeRunner()
    with fake_llm(runner) as llm:
        runner.fail_next = EngineError("the device failed")
        with pytest.raises(EngineError, match="the device failed"):
            llm.generate(["one"], GREEDY, use_tqdm=False)
        assert len(llm.generate(["one", "two"], GREEDY, use_tqdm=False)) == 2


# Bounds, interrupts, threads


def test_more_prompts_than_the_queue_holds_are_fed_as_room_is() -> None:
    prompts = [f"{number} is a number" for number in range(60)]
    with fake_llm(max_waiting=3, max_num_seqs=2) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert not llm._router._mailboxes
    with fake_llm() as llm:
        assert texts(outputs) == texts(llm.generate(prompts, GREEDY, use_tqdm=False))


def test_an_interrupt_cancels_what_runs_and_leaves_the_llm_usable() -> None:
    with fake_llm(max_waiting=4, max_num_seqs=2) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b", "c"] * 10, SamplingParams(max_tokens=40), use_tqdm=InterruptingBar)
        eventually(lambda: llm._loaded.engine.stats().running == llm._loaded.engine.stats().waiting == 0)
        assert not llm._router._mailboxes
        assert len(llm.generate(["a", "b"], GREEDY, use_tqdm=False)) == 2


def test_ctrl_c_ends_a_call_that_waits_for_the_device() -> None:
    runner = FakeRunner()
    with fake_llm(runner) as llm:
        runner.gate.clear()
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate("a", GREEDY, use_tqdm=False)
        runner.gate.set()
        assert len(llm.generate("a", GREEDY, use_tqdm=False)) == 1
        timer.join()


def test_threads_may_call_at_the_same_time() -> None:
    calls = [[f"call {call} prompt {number}" for number in range(15)] for call in range(4)]
    with fake_llm(max_waiting=5, max_num_seqs=4) as llm, ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda prompts: texts(llm.generate(prompts, GREEDY, use_tqdm=False)), calls))
        assert together == [texts(llm.generate(prompts, GREEDY, use_tqdm=False)) for prompts in calls]


def test_two_llms_do_not_know_each_other() -> None:
    with fake_llm() as one, fake_llm() as other:
        assert texts(one.generate("a", GREEDY, use_tqdm=False)) == texts(other.generate("a", GREEDY, use_tqdm=False))
        one.close()
        assert other.generate("b", GREEDY, use_tqdm=False)


# The end


def _close(llm: LLM) -> None:
    llm.close()
    llm.close()


def _leave(llm: LLM) -> None:
    with llm:
        pass


@pytest.mark.parametrize("end", [_close, _leave])
def test_a_closed_llm_has_no_thread_and_answers_nothing(end: Callable[[LLM], None]) -> None:
    with fake_llm() as llm:
        thread = llm._loaded.engine._thread
        end(llm)
        assert not thread.is_alive()
        for call in (lambda: llm.generate("a"), lambda: llm.chat([]), llm.get_default_sampling_params):
            with pytest.raises(UnavailableError, match="this LLM is closed"):
                call()


def test_the_thread_ends_with_the_last_reference() -> None:
    llm = build_llm(FakeRunner())
    llm.generate("a", GREEDY, use_tqdm=False)
    thread = llm._loaded.engine._thread
    del llm
    assert not thread.is_alive()


def test_a_call_that_runs_ends_when_the_llm_is_closed() -> None:
    runner = FakeRunner()
    with fake_llm(runner) as llm, ThreadPoolExecutor(1) as threads:
        runner.gate.clear()
        call = threads.submit(llm.generate, "a", GREEDY, False)
        eventually(lambda: llm._loaded.engine.stats().running == 1)
        threading.Timer(0.1, runner.gate.set).start()
        llm.close()
        with pytest.raises(UnavailableError):
            call.result(20)


# Adapters


def test_adapters_are_mixed_in_one_call_and_echoed(tmp_path: Path) -> None:
    sql = LoRARequest("sql", 1, adapter(tmp_path / "sql"))
    tools = LoRARequest("tools", 2, adapter(tmp_path / "tools"))
    asked = [sql, None, tools, sql]
    with fake_llm(enable_lora=True) as llm:
        outputs = llm.generate(["hello"] * 4, GREEDY, use_tqdm=False, lora_request=asked)
        alone = [llm.generate("hello", GREEDY, use_tqdm=False, lora_request=each)[0] for each in asked]
        runtime = llm._loaded.lora
    assert [output.lora_request for output in outputs] == asked
    assert [output.outputs[0].lora_request for output in outputs] == asked
    assert texts(outputs) == texts(alone)
    assert len(set(texts(outputs))) == 3
    assert isinstance(runtime, FakeRuntime)
    assert runtime.loads == [tmp_path / "sql", tmp_path / "tools"]


def test_an_adapter_without_enable_lora_is_refused_in_vllms_words() -> None:
    request = LoRARequest("sql", 1, "loras/sql")
    with fake_llm() as llm, pytest.raises(ValueError, match="LoRA is not enabled!") as refused:
        llm.generate(["a", "b"], GREEDY, use_tqdm=False, lora_request=[None, request])
    assert str(refused.value) == f"Got lora_request {request} but LoRA is not enabled!"
    assert refused.value.__notes__ == ["hint: LLM(…, enable_lora=True)"]


def test_a_missing_adapter_stops_a_call_before_it_runs(tmp_path: Path) -> None:
    runner = FakeRunner()
    requests = [LoRARequest("sql", 1, adapter(tmp_path / "sql")), LoRARequest("gone", 2, str(tmp_path / "gone"))]
    with fake_llm(runner, enable_lora=True) as llm:
        with pytest.raises(ValueError, match=r"^Loading lora gone failed: No adapter found for .*/gone"):
            llm.generate(["a", "b"], GREEDY, use_tqdm=False, lora_request=requests)
        assert not runner.steps


# Conversations


def test_chat_renders_the_template() -> None:
    with fake_llm() as llm:
        (output,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False)
        (same,) = llm.generate("<user>hi<assistant>", GREEDY, use_tqdm=False)
    assert output.prompt == "<user>hi<assistant>"
    assert texts([output]) == texts([same])


def test_chat_takes_many_conversations_and_the_templates_variables() -> None:
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    tools = [{"type": "function", "function": {"name": "f"}}]
    with fake_llm() as llm:
        outputs = llm.chat(
            messages, GREEDY, False, add_generation_prompt=False, tools=tools, chat_template_kwargs={"mood": "dry"}
        )
    assert [output.prompt for output in outputs] == ["<user>hi<tools>1<mood>dry", "<user>ho<tools>1<mood>dry"]


def test_a_model_without_a_template_says_so() -> None:
    with fake_llm(template=None) as llm, pytest.raises(ValueError, match="this model has no chat template"):
        llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
