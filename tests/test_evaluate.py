"""Evaluation with a real tiny model: figures against the texts they come from, groups, baseline, KL, JSON, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from adhere.data import Row
from adhere.errors import UserError
from adhere.inspection.inspection import Inspection
from adhere.measure.batch_cache import BatchCache
from adhere.measure.changed import inspect_changed
from adhere.measure.evaluate import Evaluation, evaluate
from adhere.measure.metrics import METRICS, token_f1, words
from adhere.measure.readers import Embedder, follow_up
from adhere.measure.settings import EvalConfig
from adhere.measure.stats import bootstrap, paired_bootstrap, permutation_test
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.report.page import write_report
from adhere.report.samples import drawn_sample
from adhere.resume import JOURNAL
from tests.families import save
from tests.progress import Seen

CONFIG = EvalConfig(num_samples=3, max_new_tokens=6, batch_size=4, seed=3)
PROMPTS = ["mary is in the garden . where is mary ?", "w3 w4 ?", "the w7 is in the w9 . where is w7 ?", "w1", "w2 w2"]
FIGURE = {"mean", "low", "high", "n"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model threads only wait for each other: a hundred times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy.load(save("llama", tmp_path_factory.mktemp("llama")), device="cpu")


@pytest.fixture(scope="module")
def baseline(policy: Policy) -> Policy:
    """The same network a step away, so that it says other things."""
    moved = policy.reference()
    generator = torch.Generator().manual_seed(1)
    for parameter in moved.network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return moved


@pytest.fixture(scope="module")
def greedy(policy: Policy) -> list[str]:
    return greedily(policy)


def greedily(policy: Policy) -> list[str]:
    """One prompt at a time, so without padding."""
    sampling = Sampling(temperature=0, max_new_tokens=6)
    return [policy.sample(policy.encode([prompt]), sampling=sampling).responses[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def evaluation(policy: Policy, baseline: Policy, greedy: list[str]) -> Evaluation:
    rows = [
        # The policy is right where it is asked for what it says anyhow.
        Row(PROMPTS[0], (greedy[0],), fields={"split": "test", "kind": "conflict", "prior": "w60"}),
        Row(PROMPTS[1], ("nothing",), fields={"split": "test", "kind": "conflict", "prior": greedy[1]}),
        Row(PROMPTS[2], ("x", greedy[2]), fields={"split": "dev", "kind": "mix", "prior": None}),
        Row(PROMPTS[3], reference=greedy[3], fields={"split": "dev"}),
        Row(PROMPTS[4]),
    ]
    return evaluate(policy, rows, CONFIG, baseline)


def test_answers_give_figures_only_where_there_are_answers(evaluation: Evaluation) -> None:
    exact = evaluation.metrics["exact_match"].after
    assert (exact.mean, exact.n) == (pytest.approx(2 / 3), 3)
    assert evaluation.after.values["exact_match"] == [1.0, 0.0, 1.0, None, None]
    assert evaluation.metrics["rouge_l"].after.n == 1
    assert evaluation.metrics["rouge_l"].after.mean == 1.0
    assert evaluation.metrics["relevance_words"].after.n == evaluation.metrics["consistency"].after.n == 5


def test_faithfulness_reads_rows_with_a_prior_in_words(evaluation: Evaluation) -> None:
    # Row 1 is right, row 2 is the prior, row 3 has none.
    assert evaluation.after.values["faithfulness"] == [1.0, 0.0, None, None, None]
    assert evaluation.after.values["prior_rate"] == [0.0, 1.0, None, None, None]


def test_figures_are_those_of_the_texts(evaluation: Evaluation, greedy: list[str]) -> None:
    assert list(evaluation.after.greedy) == greedy
    assert all(len(group) == 3 for group in evaluation.after.samples)
    first, second, third = evaluation.after.samples[0]
    agreement = (token_f1(first, second) + token_f1(first, third) + token_f1(second, third)) / 3
    assert evaluation.after.values["consistency"][0] == pytest.approx(agreement)
    pooled = [word for sample in evaluation.after.samples[1] for word in words(sample)]
    assert evaluation.after.values["distinct_1"][1] == pytest.approx(len(set(pooled)) / len(pooled))
    said = words(greedy[0])
    grams = list(pairwise(said))
    assert evaluation.after.values["repetition"][0] == pytest.approx(1 - len(set(grams)) / len(grams))
    lengths, ended = evaluation.after.values["length"], evaluation.after.values["ended"]
    assert all(length == 6 for length, own in zip(lengths, ended, strict=True) if not own)
    assert list(evaluation.metrics) == [name for name in METRICS if name in evaluation.metrics]


def test_the_difference_is_paired_by_prompt(evaluation: Evaluation, policy: Policy, baseline: Policy) -> None:
    assert evaluation.before is not None
    assert list(evaluation.before.greedy) == greedily(baseline)
    ours, theirs = evaluation.after.values["consistency"], evaluation.before.values["consistency"]
    assert ours != theirs
    found = evaluation.metrics["consistency"]
    assert found.before == bootstrap(theirs, CONFIG.seed)
    assert found.difference == paired_bootstrap(ours, theirs, CONFIG.seed)
    assert found.difference is not None and found.difference.mean != 0
    assert found.p == permutation_test(ours, theirs, CONFIG.seed)
    # The baseline takes no side where its answer is neither: a pair needs both.
    faithful = evaluation.metrics["faithfulness"]
    sides = [v for v in evaluation.before.values["faithfulness"] if v is not None]
    assert (faithful.difference.n if faithful.difference else 0) == len(sides)
    assert (faithful.before is None) == (not sides)


def test_groups_are_the_rows_that_carry_the_field(evaluation: Evaluation) -> None:
    assert list(evaluation.by_split) == ["test", "dev"]
    assert list(evaluation.by_kind) == ["conflict", "mix"]
    assert evaluation.by_kind["conflict"]["exact_match"].after.mean == 0.5
    assert evaluation.by_kind["mix"]["exact_match"].after.n == 1
    assert "rouge_l" not in evaluation.by_split["test"]
    assert evaluation.by_split["dev"]["rouge_l"].after.n == 1


def test_results_are_json_as_the_report_reads_it(evaluation: Evaluation, greedy: list[str]) -> None:
    results = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert set(results) == {"config", "metrics", "by_split", "by_kind", "samples"}
    exact = results["metrics"]["exact_match"]
    assert set(exact) == {"before", "after", "difference", "p", "p_holm"} and exact["p_holm"] >= exact["p"]
    assert set(exact["before"]) == set(exact["after"]) == set(exact["difference"]) == FIGURE
    assert set(results["metrics"]["kl"]) == {"after"}  # the baseline's own is 0 by definition
    assert results["config"]["num_samples"] == 3
    first, last = results["samples"][0], results["samples"][4]
    assert first["prompt"] == PROMPTS[0]
    assert (first["after"], first["answers"], first["kind"], first["prior"]) == (
        greedy[0],
        [greedy[0]],
        "conflict",
        "w60",
    )
    assert set(last) == {"prompt", "before", "after", "answers"}


def test_a_policy_against_itself_differs_in_nothing(policy: Policy) -> None:
    found = evaluate(policy, [Row(p) for p in PROMPTS], CONFIG, policy.reference()).metrics
    assert found["kl"].after.mean == pytest.approx(0, abs=1e-5)
    for name, result in found.items():
        if name != "kl":
            assert result.difference is not None and result.difference.mean == 0 and result.p == 1.0


def test_kl_agrees_with_the_sum_over_the_vocabulary(policy: Policy, baseline: Policy) -> None:
    # One token, so that KL(π ‖ π_ref) = Σ_v p_v log(p_v / q_v) can be summed.
    prompts = policy.encode(PROMPTS[:1])
    with torch.no_grad():
        p, q = (m.network(prompts.ids).logits[0, -1].log_softmax(-1) for m in (policy, baseline))
    exact = float((p.exp() * (p - q)).sum())
    config = EvalConfig(num_samples=4000, max_new_tokens=1)
    spread = float((p.exp() * (p - q - exact).square()).sum()) ** 0.5
    found = evaluate(policy, [Row(PROMPTS[0])], config, baseline).metrics["kl"].after.mean
    assert exact > 0.02
    assert found == pytest.approx(exact, abs=4 * spread / 4000**0.5)


def test_another_vocabulary_or_family_gives_no_kl_but_all_else(
    policy: Policy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Policy.load(save("bart", tmp_path_factory.mktemp("bart")), device="cpu")
    found = evaluate(policy, [Row(p) for p in PROMPTS[:2]], CONFIG, other).metrics
    assert "kl" not in found
    assert found["relevance_words"].difference is not None


def test_without_a_baseline_nothing_is_compared_and_the_seed_decides(policy: Policy) -> None:
    rows = [Row(p) for p in PROMPTS]
    once, again = (evaluate(policy, rows, CONFIG) for _ in range(2))
    other = evaluate(policy, rows, EvalConfig(num_samples=3, max_new_tokens=6, batch_size=4, seed=4))
    assert once == again
    assert once.after.samples != other.after.samples
    assert once.after.greedy == other.after.greedy
    assert once.before is None
    assert set(once.to_json()["metrics"]["length"]) == {"after"}
    assert "before" not in once.to_json()["samples"][0]
    assert once.by_split == once.by_kind == {}


def test_one_sample_a_prompt_leaves_consistency_out(policy: Policy) -> None:
    found = evaluate(policy, [Row("w1 w2")], EvalConfig(num_samples=1, max_new_tokens=3)).metrics
    assert "consistency" not in found and "length" in found


def test_progress_counts_the_prompts_of_each_policy(
    policy: Policy, baseline: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen()
    for each in (policy, baseline):
        monkeypatch.setattr(each, "progress", seen)
    evaluate(policy, [Row(p) for p in PROMPTS], CONFIG, baseline)
    titles = ("encoding prompts", "evaluating the baseline", "encoding prompts", "evaluating")
    assert seen.outer() == [(title, 5, [4, 5]) for title in titles]
    assert {"reading prompts", "sampling", "reading"} == seen.titles() - set(titles)


def test_a_prompt_that_cannot_be_read_is_called_by_its_line(policy: Policy) -> None:
    rows = [Row(p) for p in PROMPTS] + [Row("w1 " * 200, where="prompts.jsonl:17")]
    with pytest.raises(UserError, match=r"^prompts\.jsonl:17: the prompt has \d+ tokens"):
        evaluate(policy, rows, CONFIG)
    with pytest.raises(UserError, match="no rows"):
        evaluate(policy, [], CONFIG)


@pytest.mark.parametrize("field", ["num_samples", "max_new_tokens", "batch_size", "temperature"])
def test_settings_that_draw_nothing_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"{field} is 0"):
        EvalConfig(**{field: 0})


def test_the_results_of_an_evaluation_make_a_page(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(evaluation.to_json()), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Exact match" in page and PROMPTS[0] in page
    assert page.count("<article") == 1 + len(PROMPTS)  # one that changed comes first


def test_the_answer_that_the_page_draws_is_the_one_that_is_inspected(
    evaluation: Evaluation, policy: Policy, baseline: Policy
) -> None:
    assert evaluation.before is not None
    found = inspect_changed(evaluation, policy, baseline, None)
    sample = drawn_sample(evaluation.to_json()["samples"])
    assert found is not None and sample is not None and sample["before"] != sample["after"]
    for when, told in found.items():
        assert (
            "".join(Inspection.from_json(told).response_tokens).split()[:-1] == sample[when].split()
        )  # all but the end
    assert inspect_changed(replace(evaluation, after=evaluation.before), policy, baseline, None) is None


# What needs a model to read


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_follow_up_is_what_transformers_says_of_it(family: str, tmp_path: Path) -> None:
    reader = Policy.load(save(family, tmp_path / "model"), device="cpu")
    rows = [Row("w1 w2 .", fields={"follow_up": "w5 w6 w7"}), Row("w1"), Row("w9 .", fields={"follow_up": "w8"})]
    found = follow_up(reader, rows, ["w3", "w4", "w2"])
    assert found[1] is None
    for row, response, value in zip(rows, ["w3", "w4", "w2"], found, strict=True):
        if value is None:
            continue
        context = reader.tokenizer(f"{row.prompt} {response}", return_tensors="pt")["input_ids"]
        said = reader.tokenizer(row.fields["follow_up"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            if family == "t5":
                loss = reader.network(input_ids=context, labels=said).loss
            else:
                ids = torch.cat([context, said], 1)
                labels = ids.clone()
                labels[:, : context.shape[1]] = -100
                loss = reader.network(input_ids=ids, labels=labels).loss
        assert value == pytest.approx(float(loss), abs=1e-4)


def test_paraphrases_are_answered_and_compared_with_the_prompt(policy: Policy) -> None:
    same = Row(PROMPTS[0], fields={"paraphrases": [PROMPTS[0]]})
    other = Row(PROMPTS[0], fields={"paraphrases": [PROMPTS[1], PROMPTS[2]]})
    said = evaluate(policy, [same, other, Row(PROMPTS[3])], CONFIG).after
    alone = greedily(policy)
    texts = [(alone[0], alone[1]), (alone[0], alone[2]), (alone[1], alone[2])]
    expected = sum(token_f1(a, b) for a, b in texts) / 3
    assert said.values["rephrased"] == [1.0, pytest.approx(expected), None]


def test_a_judge_counts_wins_and_halves_ties(policy: Policy, baseline: Policy) -> None:
    rows = [Row(prompt) for prompt in PROMPTS]
    found = evaluate(policy, rows, replace(CONFIG, judge="length"), baseline)
    assert found.before is not None
    # Length is group-normalised within the two: the longer response wins.
    lengths = [
        [len(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said.greedy]
        for said in (found.after, found.before)
    ]
    expected = [0.5 if a == b else float(a > b) for a, b in zip(*lengths, strict=True)]
    assert found.after.values["win_rate"] == expected
    assert evaluate(policy, rows, replace(CONFIG, judge="length"), policy).metrics["win_rate"].after.mean == 0.5
    with pytest.raises(UserError, match="unknown reward 'lenght'"):
        EvalConfig(judge="lenght")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny sentence-transformers model, from its config."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    layers = Transformer(str(save("llama", tmp_path_factory.mktemp("embedder") / "base")))
    pooling = Pooling(layers.get_embedding_dimension())
    whole = SentenceTransformer(modules=[layers, pooling], device="cpu")
    path = str(tmp_path_factory.mktemp("embedder") / "whole")
    whole.save_pretrained(path, safe_serialization=True)
    return path


def test_relevance_is_the_cosine_of_sentence_embeddings(policy: Policy, embedder: str) -> None:
    rows = [Row(prompt) for prompt in PROMPTS]
    said = evaluate(policy, rows, replace(CONFIG, embedder=embedder)).after
    assert Embedder(embedder).relevance(["w1 w2"], ["w1 w2"]) == [pytest.approx(1.0, abs=1e-5)]
    assert said.values["relevance"] == Embedder(embedder).relevance(PROMPTS, said.greedy)
    assert "relevance" not in evaluate(policy, rows, CONFIG).metrics
    with pytest.raises(UserError, match="no embedder"):
        Embedder("./nowhere")


# Going on after a stop


def test_kept_batches_are_not_done_again_and_change_nothing(policy: Policy, baseline: Policy, tmp_path: Path) -> None:
    rows = [Row(prompt, fields={"follow_up": "w1"}) for prompt in PROMPTS]
    whole = evaluate(policy, rows, CONFIG, baseline).to_json()
    path = tmp_path / "unfinished" / JOURNAL
    this = {"seed": 1}
    evaluate(policy, rows, CONFIG, baseline, cache=BatchCache.open(tmp_path, this, resume=False))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2  # the settings, and two batches of either policy
    path.write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote
    cache = BatchCache.open(tmp_path, this, resume=True)
    assert len(cache.batches) == 2
    again = evaluate(policy, rows, CONFIG, baseline, cache)
    assert json.dumps(again.to_json()) == json.dumps(whole)
    assert len(path.read_text().splitlines()) == len(lines)
    with pytest.raises(UserError, match="add --resume"):
        BatchCache.open(tmp_path, this, resume=False)
    with pytest.raises(UserError, match="began with other settings: seed was 1, is 2"):
        BatchCache.open(tmp_path, {"seed": 2}, resume=True)
    cache.close()
    assert not path.parent.exists()
