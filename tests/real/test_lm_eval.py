"""The real lm_eval package: its `local-completions` model scores and continues text on SmolLM2 as transformers does.

Of lm_eval only the model is used, which needs few packages; its own tasks need large data libraries. So the task is
made here, and scored as lm_eval scores multiple choice: the continuation with the highest log-likelihood wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.real.exports import gguf
from tests.server.process import REAL, running

lm_eval_models = pytest.importorskip(
    "lm_eval.models.openai_completions", reason="needs lm-eval, without what it asks for"
)

pytestmark = [
    pytest.mark.real,
    # Of transformers and lm_eval, on Python's own deprecations.
    pytest.mark.filterwarnings("ignore"),
]

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August")


def questions() -> list[tuple[str, tuple[str, ...]]]:
    """Return prompts with continuations, of which the first is right."""
    made = []
    for words in (DAYS, MONTHS):
        for start in range(3):
            prompt = f"In their right order: {', '.join(words[start : start + 4])},"
            wrong = [word for word in words if word not in words[start : start + 5]][:3]
            made.append((prompt, (f" {words[start + 4]}", *(f" {word}" for word in wrong))))
    for first in range(1, 5):
        numbers = [str(first + i) for i in range(5)]
        made.append((", ".join(numbers[:4]) + ",", (f" {numbers[4]}", " 93", " seven apples")))
    return made


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]


@pytest.fixture(scope="module")
def url(exact_base: Path) -> Iterator[str]:
    flags = ("--model_path", str(exact_base), "--model_name", "smollm2", "--rest_port", "0")
    with running(*flags, module=REAL) as process:
        yield process.url


@pytest.fixture(scope="module", params=["v1", "v3"])
def model(request: pytest.FixtureRequest, url: str, exact_base: Path) -> Any:
    """lm_eval's model, with token ids in its requests, four of them at once, eight prompts in each."""
    return lm_eval_models.LocalCompletionsAPI(
        base_url=f"{url}/{request.param}/completions",
        model="smollm2",
        tokenizer=str(exact_base),
        tokenizer_backend="huggingface",
        num_concurrent=4,
        batch_size=8,
        max_retries=1,
    )


@pytest.fixture(scope="module")
def scores_of_transformers(reference: Any, exact_base: Path) -> dict[tuple[str, str], tuple[float, bool]]:
    """For each pair what lm_eval wants to know: the log-likelihood, and whether it is the greedy continuation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exact_base)
    return {
        (prompt, choice): loglikelihood(reference, tokenizer(prompt).input_ids, tokenizer(choice).input_ids)
        for prompt, choices in questions()
        for choice in choices
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from ovms_lora.export.gguf import to_hf_folder

    folder = tmp_path_factory.mktemp("reference")
    to_hf_folder(gguf(), folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loglikelihood(reference: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    import torch

    with torch.no_grad():
        logits = reference(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(continuation)[:, None])
    return float(chosen.sum()), logits.argmax(-1).tolist() == continuation


def test_multiple_choice_is_scored_as_transformers_does(
    model: Any, scores_of_transformers: dict[tuple[str, str], tuple[float, bool]]
) -> None:
    asked = questions()
    pairs = [(prompt, choice) for prompt, choices in asked for choice in choices]
    scores = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for pair, (score, greedy) in zip(pairs, scores, strict=True):
        expected, is_greedy = scores_of_transformers[pair]
        assert math.isclose(score, expected, abs_tol=2e-3), pair
        assert greedy == is_greedy, pair
    rest = iter(scores)
    right = [max((next(rest)[0], -i) for i, _ in enumerate(choices))[1] == 0 for _, choices in asked]
    assert sum(right) / len(right) > 0.7


@pytest.fixture(scope="module")
def texts_of_transformers(reference: Any, exact_base: Path) -> dict[str, str]:
    """For some prompts the greedy continuation."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exact_base)
    prompts = [f"Count: {', '.join(str(n) for n in range(first, first + 5))}," for first in range(1, 3)]
    texts = {}
    for prompt in prompts:
        tokens = tokenizer(prompt).input_ids
        whole = reference.generate(torch.tensor([tokens]), max_new_tokens=16, do_sample=False)
        texts[prompt] = tokenizer.decode(whole[0, len(tokens) :], skip_special_tokens=True)
    return texts


def test_text_is_continued_as_transformers_does(model: Any, texts_of_transformers: dict[str, str]) -> None:
    settings = {"until": ["\n", " 12"], "max_gen_toks": 16, "do_sample": False}
    arguments = [(prompt, dict(settings)) for prompt in texts_of_transformers]
    texts = model.generate_until(instances("generate_until", arguments), disable_tqdm=True)
    for text, expected in zip(texts, texts_of_transformers.values(), strict=True):
        assert text == expected.split("\n")[0].split(" 12")[0]


def test_whole_texts_are_scored_in_windows(model: Any) -> None:
    text = "One two three four five six seven. " * 4
    scores = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert -400 < scores[0] < 0
