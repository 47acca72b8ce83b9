"""Runtime adapters in one batch: each request gets its own answer, whatever else runs, is loaded or goes."""

from __future__ import annotations

import gc
import shutil
import threading
import tracemalloc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.config import EngineOptions, LoraOptions
from ovms_lora.core.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ConfigError,
    InvalidFieldError,
    ModelNotFoundError,
    UnknownAliasError,
)
from ovms_lora.core.request import AdapterUse
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.lora_config import AdapterSpec, CompositeSpec, LoraConfig
from ovms_lora.engine.lora_runtime import LoraRuntime
from ovms_lora.engine.lora_states import host_dtype
from tests.engine.lora_models import LINEARS, Ask, Base, Bases, Served, prompt, serving

RANKS = {"one": 1, "three": 3, "eight": 8, "head": 5, "sixteen": 16}
TARGETS = {"one": LINEARS, "three": ("q_proj",), "eight": ("down_proj", "v_proj", "k_proj"), "head": ("lm_head",)}
Who = str | tuple[tuple[str, float | None], ...]


@pytest.fixture(scope="module")
def llama(bases: Bases) -> Base:
    return bases.get("llama")


@pytest.fixture(scope="module")
def folders(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters by alias."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        alias: llama.adapter(folder / alias, seed=rank, r=rank, target_modules=list(TARGETS.get(alias, LINEARS)))
        for alias, rank in RANKS.items()
    }


@pytest.fixture(scope="module")
def more(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve adapters of rank 4."""
    folder = tmp_path_factory.mktemp("more")
    return {f"a{n}": llama.adapter(folder / f"a{n}", seed=100 + n, target_modules=list(LINEARS)) for n in range(12)}


@pytest.fixture(scope="module")
def served(llama: Base, folders: dict[str, Path]) -> Iterator[Served]:
    with serving(llama.folder, folders, engine={"enable_prefix_caching": False}) as model:
        yield model


def ask(served: Served, who: Who, length: int, max_tokens: int = 10) -> Ask:
    """A request of nobody (""), of an adapter or of a blend."""
    blend = [(who, None)] if isinstance(who, str) else list(who)
    return Ask(prompt(length), served.lora.blend([each for each in blend if each[0]]), max_tokens)


BLEND: Who = (("one", 0.5), ("eight", 1.5))
OTHER: Who = (("sixteen", -0.7), ("head", 0.6), ("three", 2.0))
# who asks, with how many tokens
MIXES: dict[str, list[tuple[Who, int]]] = {
    "two": [("one", 5), ("eight", 5)],
    "base between": [("one", 7), ("", 7), ("sixteen", 7)],
    "base at both ends": [("", 3), ("eight", 11), ("", 19)],
    "all": [("", 9), *((alias, 9) for alias in RANKS)],
    "the same prompt for all": [(alias, 33) for alias in ("", *RANKS, "", *RANKS)],
    "odd sizes": [("one", 1), ("", 2), ("three", 31), ("eight", 33), ("head", 64), ("", 65), ("sixteen", 127)],
    "one adapter, many rows": [("eight", n) for n in range(1, 14)],
    "blends": [(BLEND, 13), (OTHER, 17), ("", 5), ("one", 13)],
    "a blend beside its parts": [("one", 8), (BLEND, 8), ("eight", 8)],
    "heads among others": [("head", 21), ("", 21), ("head", 4), ("one", 21)],
    "single tokens": [(alias, 1) for alias in ("", *RANKS)],
    "long beside short": [("sixteen", 200), ("", 1), (OTHER, 3), ("one", 150)],
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_mixed_batch_gives_what_each_gives_alone(mix: str, served: Served) -> None:
    asks = [ask(served, *each) for each in MIXES[mix]]
    assert served.tokens(*asks) == served.alone(*asks)


def test_the_adapters_answer_differently(served: Served) -> None:
    answers = served.alone(*(ask(served, who, 20) for who in ("", *RANKS, BLEND, OTHER)))
    assert len({tuple(tokens) for tokens in answers}) == len(answers)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [5, 16])
def test_borders_of_chunks_change_nothing(
    budget: int, caching: bool, served: Served, llama: Base, folders: dict[str, Path]
) -> None:
    mix: list[tuple[Who, int]] = [("one", 40), ("", 33), (BLEND, 23), ("head", 64), ("sixteen", 7)]
    expected = served.alone(*(ask(served, *each) for each in mix))
    options = {"max_num_batched_tokens": budget, "enable_prefix_caching": caching}
    with serving(llama.folder, folders, engine=options) as small:
        asks = [ask(small, *each) for each in mix]
        assert small.tokens(*asks) == expected
        assert small.tokens(*asks) == expected
        assert (small.model.engine.stats().prefix_cache_hits > 0) == caching


def test_preemption_changes_nothing(served: Served, llama: Base, folders: dict[str, Path]) -> None:
    mix: list[tuple[Who, int]] = [("one", 25), ("", 27), (BLEND, 30), ("head", 20), ("sixteen", 29), ("", 31)]
    expected = served.alone(*(ask(served, *each, 40) for each in mix))
    with serving(llama.folder, folders, num_blocks=8, max_loras=3, total_rank=32) as small:
        assert small.tokens(*(ask(small, *each, 40) for each in mix)) == expected
        assert small.model.engine.stats().preemptions > 0


def test_an_adapter_with_a_zero_b_is_the_base(served: Served, llama: Base, tmp_path: Path) -> None:
    folder = llama.adapter(tmp_path / "zero", strength=0, target_modules=[*LINEARS, "lm_head"])
    served.lora.load(AdapterSpec("zero", folder))
    for length in (1, 20, 65):
        base, zero = ask(served, "", length), ask(served, "zero", length)
        assert served.tokens(base, zero)[1] == served.alone(base)[0]
    served.lora.unload("zero")


def test_a_strength_of_zero_is_the_base(served: Served) -> None:
    asks = ask(served, "", 20), ask(served, (("eight", 0.0),), 20)
    base, zero = served.tokens(*asks)
    assert base == zero


def test_the_prefix_cache_keeps_adapters_and_strengths_apart(
    served: Served, llama: Base, folders: dict[str, Path]
) -> None:
    order: list[Who] = ["one", "eight", "one", "", (("one", 0.5),), BLEND, "one", "", "eight", BLEND]
    expected = served.alone(*(ask(served, who, 100) for who in order))
    with serving(llama.folder, folders) as caching:
        assert caching.alone(*(ask(caching, who, 100) for who in order)) == expected
        assert caching.model.engine.stats().prefix_cache_hits >= 5 * 96


def slowly(served: Served, who: Who) -> Ask:
    return ask(served, who, 20, 150)


def started(served: Served, *asks: Ask) -> list[Any]:
    """Submit requests and wait until each has given tokens."""
    requests = [served.submit(each) for each in asks]
    while any(r.request_id not in served.answers or not served.answers[r.request_id].token_ids for r in requests):
        threading.Event().wait(0.001)
    assert not any(served.answers[request.request_id].finished for request in requests), "too quick for this test"
    return requests


def test_an_alias_reloaded_has_new_weights_and_requests_keep_their_version(
    llama: Base, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = llama.adapter(tmp_path / "other", seed=77, r=1, target_modules=list(LINEARS))
    with serving(llama.folder, {"x": folders["one"], "y": other}, engine={"max_num_seqs": 3}) as model:
        old, new = model.alone(slowly(model, "x"), slowly(model, "y"))
        assert old != new
        before = slowly(model, "x")
        running = started(model, before)
        waiting = [model.submit(before) for _ in range(4)]  # more than may run at once
        model.lora.load(AdapterSpec("x", other), replace=True)
        after = [model.submit(slowly(model, "x")) for _ in range(2)]
        answers = [answer.token_ids for answer in model.wait(*running, *waiting, *after)]
    assert answers == [old] * 5 + [new] * 2


def test_a_folder_rewritten_and_reloaded(llama: Base, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "changing"
    shutil.copytree(folders["one"], folder)
    with serving(llama.folder, {"x": folder}) as model:
        old = model.alone(slowly(model, "x"))
        shutil.rmtree(folder)
        shutil.copytree(folders["eight"], folder)
        assert model.alone(slowly(model, "x")) == old
        model.lora.load(AdapterSpec("x", folder), replace=True)
        new = model.alone(slowly(model, "x"))
        shutil.rmtree(folder)
        shutil.copytree(folders["one"], folder)
        model.lora.load(AdapterSpec("x", folder), replace=True)
        assert model.alone(slowly(model, "x")) == old != new


@pytest.mark.parametrize("max_loras", [1, 3])
def test_more_adapters_than_places_run_in_waves(max_loras: int, llama: Base, more: dict[str, Path]) -> None:
    with serving(llama.folder, more) as wide:
        expected = wide.alone(*(ask(wide, alias, 12) for alias in more))
    with serving(llama.folder, more, max_loras=max_loras, max_cpu_loras=4) as model:
        asks = [ask(model, alias, 12) for alias in more]
        assert model.tokens(*asks, *reversed(asks)) == expected + expected[::-1]
        assert len(model.lora.graphs.residency.resident) <= max_loras


def test_the_graph_grows_while_requests_run(served: Served, llama: Base, folders: dict[str, Path]) -> None:
    with serving(llama.folder, {"three": folders["three"]}) as model:
        asks = [slowly(model, "three"), slowly(model, "")]
        expected = model.alone(*asks)
        running = started(model, *asks)
        model.lora.load(AdapterSpec("sixteen", folders["sixteen"]))  # other linears and more rank
        model.lora.load(AdapterSpec("head", folders["head"]))
        late = ask(model, "sixteen", 20), ask(model, "head", 20)
        assert model.tokens(*late) == served.alone(ask(served, "sixteen", 20), ask(served, "head", 20))
        assert [answer.token_ids for answer in model.wait(*running)] == expected
        assert model.alone(*asks) == expected


def test_adapters_come_to_a_model_that_had_none(served: Served, llama: Base, folders: dict[str, Path]) -> None:
    with serving(llama.folder, {}) as model:
        running = started(model, slowly(model, ""))
        model.lora.load(AdapterSpec("eight", folders["eight"]))
        (late,) = model.tokens(ask(model, "eight", 20))
        model.wait(*running)
    assert [late] == served.alone(ask(served, "eight", 20))


def test_unloading_lets_requests_end_and_frees_the_memory(llama: Base, folders: dict[str, Path]) -> None:
    with serving(llama.folder, {"one": folders["one"], "eight": folders["eight"]}, engine={"max_num_seqs": 2}) as model:
        asked = slowly(model, "one")
        expected = model.alone(asked)
        running = started(model, asked)
        waiting = [model.submit(asked) for _ in range(3)]
        alive = weakref.ref(asked.adapters[0].adapter)
        model.lora.unload("one")
        with pytest.raises(ModelNotFoundError):
            model.lora.select("one")
        assert [answer.token_ids for answer in model.wait(*running, *waiting)] == expected * 4
        del asked, running, waiting
        model.answers = None  # type: ignore[assignment]  # nothing here holds the requests
        model.model.engine.call(gc.collect)
        assert alive() is None


def test_huge_strengths_spoil_nobody_else(served: Served) -> None:
    mix: list[tuple[Who, int]] = [("one", 40), ("", 40), ("eight", 40)]
    asks = [ask(served, *each) for each in mix]
    expected = served.alone(*asks)
    bad = [ask(served, (("sixteen", alpha), ("head", -alpha)), 40) for alpha in (1e30, 3e38)]
    requests = [served.submit(each) for each in (bad[0], asks[0], bad[1], asks[1], asks[2])]
    served.answers.wait(*requests)
    good = [served.answers[requests[index].request_id] for index in (1, 3, 4)]
    assert [answer.token_ids for answer in good] == expected
    assert served.tokens(*asks) == expected  # in blocks that the bad ones may have had


def test_blocks_that_held_no_numbers_are_used_again(served: Served, llama: Base, folders: dict[str, Path]) -> None:
    expected = served.alone(ask(served, "", 70), ask(served, "eight", 40))
    with serving(llama.folder, folders, num_blocks=4) as small:
        for strength in (1e30, 3e38):
            bad = small.submit(ask(small, (("sixteen", strength),), 100))
            small.answers.wait(bad)
            assert small.answers[bad.request_id].error, "it was to have no finite logits"
            assert small.alone(ask(small, "", 70), ask(small, "eight", 40)) == expected


def test_values_as_large_as_is_allowed_spoil_nobody_else(served: Served, llama: Base, tmp_path: Path) -> None:
    folder = llama.adapter(tmp_path / "huge", strength=2e13, target_modules=[*LINEARS, "lm_head"])
    served.lora.load(AdapterSpec("huge", folder))
    asks = [ask(served, who, 40) for who in ("one", "", BLEND)]
    expected = served.alone(*asks)
    huge = ask(served, "huge", 40)
    requests = [served.submit(each) for each in (asks[0], huge, asks[1], huge, asks[2])]
    served.answers.wait(*requests)
    assert [served.answers[requests[index].request_id].token_ids for index in (0, 2, 4)] == expected
    assert served.tokens(*asks) == expected
    served.lora.unload("huge")


def test_a_load_that_fails_changes_nothing(served: Served, folders: dict[str, Path], tmp_path: Path) -> None:
    before = served.lora.cards()
    with pytest.raises(AdapterExistsError):
        served.lora.load(AdapterSpec("one", folders["eight"]))
    with pytest.raises(AdapterNotFoundError):
        served.lora.load(AdapterSpec("one", tmp_path / "nowhere"), replace=True)
    with pytest.raises(AdapterError):
        served.lora.load(AdapterSpec("one", tmp_path), replace=True)
    with pytest.raises(ConfigError):
        served.lora.load(AdapterSpec("text", folders["one"]))
    with pytest.raises(UnknownAliasError):
        served.lora.unload("nobody")
    assert [replace(card, resident=False) for card in served.lora.cards()] == [
        replace(card, resident=False) for card in before
    ]


def test_strengths_belong_to_what_was_selected(llama: Base, folders: dict[str, Path]) -> None:
    specs = tuple(AdapterSpec(alias, folders[alias]) for alias in ("one", "eight"))
    config = LoraConfig(adapters=specs, composites=(CompositeSpec("mix", (("one", 0.5), ("eight", None))),))
    with serving(llama.folder, lora=config) as model:
        lora = model.lora
        assert [use.alpha for use in lora.select("mix", {"eight": 3.0})] == [0.5, 3.0]
        assert [use.alpha for use in lora.select("one", {"one": 0.25})] == [0.25]
        with pytest.raises(InvalidFieldError, match="lora_alphas key 'x' is not part of composite 'mix'"):
            lora.select("mix", {"x": 1.0})
        with pytest.raises(InvalidFieldError, match="lora_alphas key 'x' not allowed when targeting adapter 'one'"):
            lora.select("one", {"x": 1.0})
        with pytest.raises(ConfigError, match="part of composite"):
            lora.unload("one")
        with pytest.raises(AdapterExistsError):
            lora.load(AdapterSpec("mix", folders["one"]), replace=True)


def test_a_blend_that_never_fits_is_refused(llama: Base, more: dict[str, Path]) -> None:
    specs = [AdapterSpec(alias, folder, pinned=alias == "a0") for alias, folder in more.items()]
    with serving(llama.folder, specs, max_loras=3, total_rank=11) as model:
        with pytest.raises(InvalidFieldError, match="max_loras 3"):
            model.lora.blend([("a1", None), ("a2", None), ("a3", None)])
        with pytest.raises(InvalidFieldError, match="exceeds the total rank 11"):
            model.lora.blend([("a1", None), ("a2", None)])
        assert model.tokens(ask(model, "a1", 5), ask(model, "a0", 5), ask(model, "a2", 5))


def test_adapters_are_found_in_the_loading_path(served: Served, llama: Base, folders: dict[str, Path]) -> None:
    config = LoraConfig(loading_path=folders["one"].parent)
    config = replace(config, options=config.options.model_copy(update={"lora_dtype": "f32"}))
    with serving(llama.folder, lora=config) as model:
        path = model.lora.loading_path
        assert path and path.find("eight") and not model.lora.has("eight")
        seen: list[tuple[AdapterUse, ...]] = []
        threads = [threading.Thread(target=lambda: seen.append(model.lora.select("eight"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(uses[0].adapter) for uses in seen}) == 1, "several readers made one adapter"
        assert model.alone(ask(model, "eight", 20)) == served.alone(ask(served, "eight", 20))
        for name in ("nothing", "../one", "..", "text"):
            assert not path.find(name)
            with pytest.raises(ModelNotFoundError):
                model.lora.select(name)


def test_an_adapter_changed_in_its_folder_while_it_was_out_of_memory(
    served: Served, llama: Base, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["three"], tmp_path / "x")
    with serving(llama.folder, {"x": tmp_path / "x", "eight": folders["eight"]}, max_cpu_loras=1) as model:
        shutil.rmtree(tmp_path / "x")
        shutil.copytree(folders["sixteen"], tmp_path / "x")  # of more rank, and for linears that the graph lacks
        assert model.alone(ask(model, "x", 20)) == served.alone(ask(served, "sixteen", 20))
        assert model.lora.cards()[0].resident


def test_what_was_asked_for_before_others_were_pinned_still_runs(llama: Base, more: dict[str, Path]) -> None:
    with serving(llama.folder, more, max_loras=2) as model:
        blend = replace(ask(model, (("a1", None), ("a2", None)), 20), max_tokens=5)
        expected = model.alone(blend)
        model.lora.load(AdapterSpec("a0", more["a0"], pinned=True), replace=True)
        model.alone(ask(model, "a0", 5))
        assert model.alone(blend) == expected


def test_a_pinned_adapter_stays_in_the_graph(llama: Base, more: dict[str, Path]) -> None:
    specs = [AdapterSpec(alias, folder, pinned=alias == "a0") for alias, folder in more.items()]
    with serving(llama.folder, specs, max_loras=2) as model:
        for alias in more:
            model.alone(ask(model, alias, 5))
            assert {card.alias for card in model.lora.cards() if card.resident} == {"a0", alias}


def test_adapters_configured_together_have_room_together(llama: Base, more: dict[str, Path]) -> None:
    parts = ("a0", "a1", "a2")
    with serving(llama.folder, {}) as model:
        specs = tuple(AdapterSpec(alias, more[alias]) for alias in parts)
        model.lora.apply(
            LoraConfig(adapters=specs, composites=(CompositeSpec("mix", tuple((part, None) for part in parts)),))
        )
        model.alone(*(ask(model, alias, 5) for alias in parts))
        assert all(card.resident for card in model.lora.cards() if not card.components)
        assert len(model.lora.select("mix")) == 3


@pytest.mark.parametrize("rank", [3, 4])
def test_a_rank_beyond_the_total_is_refused_at_start_too(rank: int, llama: Base, more: dict[str, Path]) -> None:
    config = LoraConfig(LoraOptions(total_rank=rank), (AdapterSpec("a0", more["a0"]),))
    lora = LoraRuntime(GraphSource(llama.folder, EngineOptions()), config)
    assert (lora.failures.keys() == {"a0"}) == (rank < 4)


def test_a_folder_gone_bad_is_the_request_s_error(llama: Base, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["three"], tmp_path / "three")
    shutil.copytree(folders["eight"], tmp_path / "eight")
    mine = {"three": tmp_path / "three", "eight": tmp_path / "eight"}
    with serving(llama.folder, mine, max_cpu_loras=1, max_loras=1) as model:
        (tmp_path / "three" / "adapter_model.safetensors").write_bytes(b"\0" * 16)
        with pytest.raises(AdapterUnavailableError):
            model.lora.select("three")
        assert model.alone(ask(model, "eight", 5))


def test_a_configuration_is_applied_whole_or_not_at_all(
    served: Served, llama: Base, folders: dict[str, Path], tmp_path: Path
) -> None:
    with serving(llama.folder, {"one": folders["one"]}) as model:
        running = started(model, slowly(model, "one"))
        bad = (AdapterSpec("eight", folders["eight"]), AdapterSpec("none", tmp_path / "none"))
        with pytest.raises(AdapterNotFoundError):
            model.lora.apply(LoraConfig(adapters=bad))
        assert [card.alias for card in model.lora.cards()] == ["one"]
        composites = (CompositeSpec("mix", (("eight", 2.0),)),)
        model.lora.apply(LoraConfig(adapters=bad[:1], composites=composites))
        assert [card.alias for card in model.lora.cards()] == ["eight", "mix"]
        assert not model.lora.has("one")
        doubled = replace(ask(model, "", 20), adapters=model.lora.select("mix"))
        assert model.alone(doubled) == served.alone(ask(served, (("eight", 2.0),), 20))
        model.wait(*running)


def test_a_configured_adapter_that_is_bad_is_left_out(llama: Base, folders: dict[str, Path], tmp_path: Path) -> None:
    specs = (AdapterSpec("one", folders["one"]), AdapterSpec("bad", tmp_path))
    with pytest.raises(AssertionError, match="bad"), serving(llama.folder, lora=LoraConfig(adapters=specs)):
        pass


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_twenty_further_host_adapters_take_their_own_bytes_and_give_them_back(
    dtype: str, llama: Base, tmp_path: Path
) -> None:
    targets = [*LINEARS, "lm_head"]
    folders = [llama.adapter(tmp_path / "0", r=48, target_modules=targets, dtype="bfloat16")]
    for number in range(1, 21):  # another digest each
        folders.append(tmp_path / str(number))
        shutil.copytree(folders[0], folders[-1])
        text = (folders[-1] / "adapter_config.json").read_text()
        (folders[-1] / "adapter_config.json").write_text(text.replace('"lora_alpha": 8', f'"lora_alpha": {8 + number}'))
    options = LoraOptions.model_validate({"lora_dtype": dtype})
    config = LoraConfig(options, (AdapterSpec("0", folders[0]),))
    lora = LoraRuntime(GraphSource(llama.folder, EngineOptions()), config)
    gc.collect()
    tracemalloc.start()
    for number in range(1, 21):
        lora.load(AdapterSpec(str(number), folders[number]))
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    (pair_bytes,) = {use.adapter.nbytes for number in range(21) for use in _loaded(lora, str(number))}
    values = sum(pair.a.size + pair.b.size for pair in _loaded(lora, "1")[0].adapter.layers.values())
    for number in range(1, 21):
        lora.unload(str(number))
    gc.collect()
    left = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert pair_bytes == values * host_dtype(dtype).itemsize
    assert taken <= 1.1 * 20 * pair_bytes
    assert left <= 0.05 * 20 * pair_bytes


def _loaded(lora: LoraRuntime, alias: str) -> tuple[Any, ...]:
    entry, adapter = lora.store.get(alias)
    return (AdapterUse(adapter, entry.alpha),)
