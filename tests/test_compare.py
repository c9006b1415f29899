"""`adhere compare` on tiny models: every arm end to end, finished runs left alone, figures against a hand-made case."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from adhere.cli import main
from adhere.compare.estimates import summarise
from adhere.compare.plan import arm_of, jobs_of
from adhere.compare.settings import CompareConfig, Files, folder_name
from adhere.compare.work import share_data
from adhere.data import Columns, read_rows
from adhere.errors import UserError
from adhere.model.policy import Policy
from adhere.prompt import prompt_key
from adhere.report.compare import write_compare
from tests.families import save

ROWS = [
    {
        "prompt": f"w{i} is in the w{i + 1} . where is w{i} ?",
        "answers": [f"w{i + 1}"],
        "split": "even" if i % 2 else "odd",
    }
    for i in range(6)
]
TRAIN = {"steps": 2, "prompts_per_step": 2, "num_samples": 3, "sampling": {"max_new_tokens": 4}, "device": "cpu"}
ARMS = {"no RL": {"reward": "none"}, "overlap": {"reward": "overlap"}, "random": {"reward": "random"}}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save("llama", tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def plan(tmp_path, model):
    def made(**options):
        config = {
            "models": [model],
            "arms": ARMS,
            "data": {
                "name": "files",
                "prompts": write(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS]),
                "evaluation": write(tmp_path / "evaluation.jsonl", ROWS),
            },
            "train": TRAIN,
            "evaluation": {"num_samples": 2, "max_new_tokens": 4},
            "seeds": [0, 1],
            "against": "overlap",
            "audited": 2,
            "jobs": 1,
            **options,
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return made


@pytest.mark.slow
def test_arms_run_once_and_stand_side_by_side(plan, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["compare", str(plan()), "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (arms,) = found["models"].values()
    assert list(arms) == list(ARMS)
    assert arms["no RL"]["tokens"] == 0 and arms["overlap"]["tokens"] > 0
    assert set(arms["overlap"]["by_split"]) == {"even", "odd"} and arms["overlap"]["hacked"] is not None
    assert arms["overlap"]["behind"] == {} and arms["no RL"]["gain"] == {}
    assert len(arms["overlap"]["curve"]) == 2
    page = (output / "compare.html").read_text()
    assert "Learning curves" in page and "<script" not in page

    times = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    assert len(times) == 6
    next(iter(times)).unlink()
    assert main(["compare", str(plan()), "--output", str(output), "--quiet"]) == 0
    again = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    assert sum(again[path] != times[path] for path in times) == 1

    write(tmp_path / "evaluation.jsonl", ROWS[:4])
    path = tmp_path / "plan.yaml"
    assert main(["compare", str(path), "--output", str(output)]) == 2
    assert "began with other settings: content." in capsys.readouterr().err

    changed = plan(train={**TRAIN, "steps": 3})
    assert main(["compare", str(changed), "--output", str(output)]) == 2
    assert "began with other settings: train.steps was 2, is 3; choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": {}}, "`arms` is empty"),
        ({"against": "overlop"}, "did you mean overlap?"),
        ({"arms": {"overlap": {"reward": "overlop"}}}, "arm overlap: unknown reward 'overlop'"),
        ({"arms": {"overlap": {"labels": 3}}}, "arm overlap: has no `reward`"),
        ({"arms": {"overlap": {"reward": "human"}}}, "arm overlap: `human` learns from labelled pairs"),
        ({"arms": {"overlap": {"reward": "overlap", "labels": 3}}}, "only human and hybrid use labels"),
        ({"arms": {"overlap": {"reward": "human", "labels": 3}}}, "arms that learn from labels need `pairs`"),
        ({"arms": {"overlap": {"reward": "overlap", "stepz": 3}}}, "arm overlap: unknown option 'stepz'"),
        ({"train": {**TRAIN, "reward": "paper"}}, "the reward of an arm is its own"),
        ({"seeds": [0, 0]}, "`seeds` is empty or names one twice"),
        ({"jobs": 0}, "jobs is 0"),
        ({"audited": 1}, "`audited` is 1"),
        ({"arms": {"overlap": {"reward": "overlap"}, "Overlap!": {"reward": "none"}}}, "would share a folder"),
    ],
)
def test_bad_plans_are_one_clear_line_and_write_nothing(plan, tmp_path, capsys, options, message):
    assert main(["compare", str(plan(**options)), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_file_of_prompts_is_told_before_anything_runs(plan, tmp_path, capsys):
    path = plan(data={"name": "files", "prompts": str(tmp_path / "none.jsonl"), "evaluation": str(tmp_path / "x")})
    assert main(["compare", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "none.jsonl" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_arm_that_fails_is_named(plan, tmp_path, capsys):
    # Each step multiplies the weights by 1 - 1 · 10: they end in what is no number, whatever the rewards are.
    wild = {"reward": "random", "learning_rate": 1.0, "weight_decay": 10.0, "warmup_steps": 0, "steps": 60}
    arms = {"overlap": {"reward": "overlap"}, "wild": wild}
    code = main(["compare", str(plan(arms=arms, seeds=[0], audited=0)), "--output", str(tmp_path / "out")])
    assert code == 1
    assert "arm wild, seed 0" in capsys.readouterr().err


def test_figures_are_over_prompts_with_seeds_averaged(tmp_path):
    config = CompareConfig(
        models=("m",), arms={"no RL": {"reward": "none"}, "a": {"reward": "overlap"}}, against="a", seeds=(0, 1)
    )
    jobs = jobs_of(config, tmp_path)

    def result(values, **more):
        return {"values": {"exact_match": values}, "responses": ["x"], "seconds": {"training": 2.0}, **more}

    results = [
        result([0.0, 1.0, None]),
        result([0.0, 1.0, None]),
        result([1.0, 1.0, None], tokens=10, pairs=[1.0, 0.5], curve=[{"step": 1, "reward": 1.0, "kl": 0.5}]),
        result([0.0, 1.0, None], tokens=20, pairs=[0.0, 0.5], curve=[], stopped="x"),
    ]
    arms = summarise(config, jobs, results, {"first": [0], "none": [2]})["m"]
    # Prompt 1: (1 + 0) / 2, prompt 2: 1; the third has no figure.
    assert arms["a"].metrics["exact_match"].mean == 0.75 and arms["a"].metrics["exact_match"].n == 2
    assert arms["a"].gain["exact_match"][0].mean == 0.25 and arms["no RL"].behind["exact_match"][0].mean == 0.25
    assert arms["a"].by_split == {"first": {"exact_match": arms["a"].by_split["first"]["exact_match"]}, "none": {}}
    assert arms["a"].pairs is not None and arms["a"].pairs.mean == 0.5
    assert arms["a"].tokens == 15 and arms["a"].stopped == 1 and arms["a"].kl == 0.5
    assert arms["a"].curve == [{"step": 1, "reward": 1.0, "kl": 0.5}]


def test_the_settings_of_a_run_change_with_what_matters_and_not_with_the_place(tmp_path):
    config = CompareConfig(models=("m",), arms={"a": {"reward": "overlap"}}, against="a", seeds=(0,))
    (job,), (moved,) = jobs_of(config, tmp_path / "x"), jobs_of(config, tmp_path / "y")
    (other,) = jobs_of(replace(config, train={"steps": 7}), tmp_path / "x")
    assert job.settings == moved.settings != other.settings


def test_options_of_an_arm_go_before_those_of_all(tmp_path):
    config = CompareConfig(
        models=("m",), arms={"a": {"reward": "overlap", "steps": 9}}, against="a", seeds=(0,), train={"steps": 7}
    )
    assert jobs_of(config, tmp_path)[0].training.steps == 9


def test_an_arm_is_read_from_a_mapping():
    arm = arm_of("x", {"reward": "hybrid", "labels": 30, "algorithm": "rloo"})
    assert arm.reward == "hybrid" and arm.labels == 30 and arm.train == {"algorithm": "rloo"}
    assert folder_name("../etc") == "etc" and folder_name("!!") == "arm"


def test_the_page_escapes_names_and_refuses_what_is_no_comparison(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        write_compare(tmp_path)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"context": "Ann sat.", "question": "Who sat?", "answers": ["Ann"]}, Columns()),
        ({"documents": ["Ann sat.", "Bo ran."], "question": "Who sat?"}, Columns()),
        (
            {"messages": [{"role": "user", "content": "{context} {question}"}], "context": "A.", "question": "B?"},
            Columns(),
        ),
        (
            {"passage": "Ann sat.", "ask": "Who sat?", "gold": ["Ann"]},
            Columns(template="{passage} {ask}", answers_field="gold"),
        ),
    ],
)
def test_shared_rows_are_read_as_the_files_that_they_came_from(tmp_path, model, row, columns):
    path = write(tmp_path / "rows.jsonl", [row])
    data = Files(path, path, columns=columns)
    job, *_ = jobs_of(CompareConfig(models=(model,), arms=ARMS, data=data, against="overlap"), tmp_path)
    share_data(model, data, job.data, Policy.load(model, device="cpu"))
    given = read_rows(path, columns)
    for name in ("prompts", "evaluation"):
        again = read_rows(job.data / f"{name}.jsonl", job.training.columns)
        assert [prompt_key(r.prompt) for r in again] == [prompt_key(r.prompt) for r in given]
        assert [r.answers for r in again] == [r.answers for r in given]
