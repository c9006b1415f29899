"""Configuration: flags and YAML meet in one frozen tree, every fault is told at once, and a dump reads back equal."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adhere.config import add_arguments, dump_yaml, flags_given, load_config, to_dict
from adhere.errors import UnsupportedModel, UserError
from adhere.options import Above, AtLeast, AtMost, check, options


@dataclass(frozen=True)
class PPO:
    """A variant."""

    gae_lambda: float = 0.95
    """Decay of the advantage
    estimate."""
    clip: float = 0.2
    """Clip range, 100% = 1.0."""


@dataclass(frozen=True)
class GRPO:
    clip: float = 0.25
    normalise: Literal["group", "batch"] = "group"


@dataclass(frozen=True)
class Reinforce:
    name: ClassVar[str] = "reinforce"
    baseline: bool = True


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    """Softmax temperature."""
    top_k: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(
                f"temperature {self.temperature} is not above 0", where="--temperature", fix="give 0.1 or more"
            )


@dataclass(frozen=True)
class Lora:
    rank: int = 8
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    model: str
    """A folder or hub id."""
    output: Path = Path("out")
    steps: int = 100
    """Updates in all."""
    rate: float = 1e-5
    seed: int = 0
    verbose: bool = False
    betas: tuple[float, float] = (0.9, 0.99)
    tags: list[str] = field(default_factory=list)
    reward: str | dict[str, float] = "attention"
    scorer: Literal["reference", "policy"] = "reference"
    budget: int | float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    algorithm: PPO | GRPO | Reinforce = PPO()
    sampling: Sampling = Sampling(temperature=0.7)
    lora: Lora | None = None


def from_flags(line: str, yaml: Path | None = None) -> Config:
    parser = argparse.ArgumentParser()
    add_arguments(lambda option: parser, Config)
    return load_config(Config, yaml, flags_given(parser.parse_args(line.split()), Config))


def from_yaml(folder: Path, text: str, **overrides: Any) -> Config:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_config(Config, path, overrides)


def test_defaults_are_the_dataclass_own() -> None:
    assert load_config(Config, None, {"model": "m"}) == Config("m")


def test_flags_reach_every_kind_of_field() -> None:
    line = (
        "--model m --output runs/a --steps 1_000 --rate 1e-6 --verbose --betas 0.8 .95 --tags a b --scorer policy "
        "--budget 2.5 --algorithm grpo --normalise batch --temperature 0.5 --top-k 5 --sampling-seed 9 --lora-rank 4 "
        "--lora-targets q v --seed 3"
    )
    assert from_flags(line) == Config(
        "m", Path("runs/a"), 1000, 1e-6, 3, True, (0.8, 0.95), ["a", "b"], "attention", "policy", 2.5, {},
        GRPO(normalise="batch"), Sampling(0.5, 5, 9), Lora(4, ("q", "v")),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--reward coverage", Config("m", reward="coverage")),
        ("--reward {coverage:1}", Config("m", reward="{coverage:1}")),  # YAML needs the space: so it is text
        ("--budget 7", Config("m", budget=7)),
        ("--budget none", Config("m")),
        ("--top-k null", Config("m", sampling=Sampling(0.7))),
        ("--lora", Config("m", lora=Lora())),
        ("--no-lora", Config("m")),
        ("--lora --lora-rank 2", Config("m", lora=Lora(2))),
        ("--no-verbose", Config("m")),
        ("--gae-lambda 1", Config("m", algorithm=PPO(1.0))),
        ("--algorithm reinforce --no-baseline", Config("m", algorithm=Reinforce(False))),
        ("--algorithm grpo --clip 0.1", Config("m", algorithm=GRPO(0.1))),
        ("--tags", Config("m")),
        ("--model 007", Config("007")),
    ],
)
def test_a_flag_is_read_by_the_type_of_its_field(line: str, expected: Config) -> None:
    assert from_flags(f"--model m {line}") == expected


def test_a_mapping_is_given_as_yaml_in_one_flag() -> None:
    assert load_config(Config, None, {"model": "m", "reward": "{coverage: 1, focus: 5e-1}"}).reward == {
        "coverage": 1.0,
        "focus": 0.5,
    }
    with pytest.raises(UserError, match=r"--extra: `extra` must be a mapping, not '\{a: '"):
        load_config(Config, None, {"model": "m", "extra": "{a: "})


def test_yaml_fills_the_tree_and_flags_go_before_it(tmp_path: Path) -> None:
    text = (
        "model: m\nrate: 1e-4\nreward: {coverage: 1, focus: 1e-1}\nalgorithm: {name: ppo, gae_lambda: 0.9}\n"
        "sampling:\n  top_k: 3\nlora: {rank: 2}\nbetas: [0.5, 1]\n"
    )
    expected = Config(
        "m", rate=1e-4, reward={"coverage": 1.0, "focus": 0.1}, algorithm=PPO(0.9), sampling=Sampling(0.7, 3),
        lora=Lora(2), betas=(0.5, 1.0),
    )  # fmt: skip
    assert from_yaml(tmp_path, text) == expected
    path = tmp_path / "run.yaml"
    assert from_flags("--model n --clip 0.3 --temperature 0.2 --lora-targets q --lora", path) == Config(
        "n", rate=1e-4, reward={"coverage": 1.0, "focus": 0.1}, algorithm=PPO(0.9, 0.3), sampling=Sampling(0.2, 3),
        lora=Lora(2, ("q",)), betas=(0.5, 1.0),
    )  # fmt: skip
    assert from_flags("--no-lora", path).lora is None


def test_another_algorithm_than_the_file_names_starts_from_its_own_defaults(tmp_path: Path) -> None:
    text = "model: m\nalgorithm: {name: ppo, gae_lambda: 0.9, clip: 0.4}\n"
    assert from_yaml(tmp_path, text, algorithm="grpo").algorithm == GRPO()
    assert from_yaml(tmp_path, text, algorithm="ppo").algorithm == PPO(0.9, 0.4)
    assert from_yaml(tmp_path, text, algorithm={"name": "grpo", "clip": 0.1}).algorithm == GRPO(0.1)
    assert from_yaml(tmp_path, text, algorithm={"clip": 0.1}).algorithm == PPO(0.9, 0.1)
    assert from_yaml(tmp_path, "model: m\nalgorithm: grpo\n", **{"algorithm.clip": 0.3}).algorithm == GRPO(0.3)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_a_file_without_options_is_all_defaults(tmp_path: Path, text: str) -> None:
    assert from_yaml(tmp_path, text, model="m") == Config("m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modl: x", "run.yaml:2: unknown option 'modl'; did you mean model?"),
        ("sampling: {temprature: 1}", "run.yaml:2: unknown option 'sampling.temprature'; did you mean sampling.temper"),
        ("top_k: 3", "run.yaml:2: unknown option 'top_k'; did you mean sampling.top_k"),
        ("steps: ten", "run.yaml:2: `steps` must be a whole number, not 'ten'"),
        ("steps: 1.5", "run.yaml:2: `steps` must be a whole number, not 1.5"),
        ("steps: true", "run.yaml:2: `steps` must be a whole number, not true"),
        ("steps: '3'", "run.yaml:2: `steps` must be a whole number, not '3'"),
        ("steps:", "run.yaml:2: `steps` must be a whole number, not null"),
        ("rate: .nan", "run.yaml:2: `rate` must be a number, not nan"),
        ("rate: fast", "run.yaml:2: `rate` must be a number, not 'fast'"),
        ("output: 3", "run.yaml:2: `output` must be a path, not 3"),
        ("verbose: 1", "run.yaml:2: `verbose` must be true or false, not 1"),
        ("betas: [1]", "run.yaml:2: `betas` must be a list of 2: a number, a number, not a list"),
        ("tags: a", "run.yaml:2: `tags` must be a list, each text, not 'a'"),
        ("tags: [1]", "run.yaml:2: `tags` must be a list, each text, not a list"),
        ("reward: {coverage: x}", "run.yaml:2: `reward` must be text or a mapping, not a mapping"),
        ("reward: no", "not false; put it in quotes: YAML reads yes, no, on and off as true or false"),
        ("scorer: refrence", "run.yaml:2: unknown `scorer` 'refrence'; did you mean reference?"),
        ("scorer: 3", "run.yaml:2: `scorer` must be one of reference, policy, not 3"),
        ("budget: x", "run.yaml:2: `budget` must be a whole number or a number or null, not 'x'"),
        ("sampling: 3", "run.yaml:2: `sampling` is 3; write its options as a mapping: temperature, top_k, seed"),
        ("lora: yes please", "run.yaml:2: `lora` is 'yes please'; write its options as a mapping: rank, targets"),
        ("algorithm: pppo", "run.yaml:2: unknown algorithm 'pppo'; did you mean ppo or grpo?"),
        ("algorithm: {name: [ppo]}", "run.yaml:2: unknown algorithm \"['ppo']\"; did you mean ppo"),
        ("rate: 1" + "0" * 400, "run.yaml:2: `rate` must be a number, not 1000"),
        ("algorithm: [ppo]", "run.yaml:2: `algorithm` is a list; write {name: ppo | grpo | reinforce, …}"),
        ("algorithm:\n  name: dqn", "run.yaml:3: unknown algorithm 'dqn'; choose one of grpo, ppo, reinforce"),
        ("algorithm:\n  name: grpo\n  gae_lambda: 1",
         "run.yaml:4: `gae_lambda` is an option of ppo, not of grpo; leave it out or choose ppo"),
        ("algorithm: {name: reinforce, clip: 1}", "`clip` is an option of ppo and grpo, not of reinforce"),
        ("sampling: {temperature: -1}", "--temperature: temperature -1.0 is not above 0; give 0.1 or more"),
        ("steps: 1\nsteps: 2", "run.yaml:3: `steps` stands twice (first at "),
        ("extra: [{a: 1, a: 2}]", "run.yaml:2: `extra.0.a` stands twice"),
        ("steps: [1", "not YAML (expected ',' or ']'"),
        ("extra: &a {b: 1}\ntags: *a", "not YAML (aliases are not read)"),
        ("extra: !!python/object:os.system {}", "run.yaml:2: not YAML (could not determine a constructor"),
        ("extra: 2020-99-99", "not YAML that can be read"),
    ],
)  # fmt: skip
def test_each_fault_of_a_file_has_its_line_and_what_to_write(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_yaml(tmp_path, f"model: m\n{text}\n")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_file_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such file; check the path"):
        load_config(Config, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(Config, tmp_path)
    with pytest.raises(UserError, match="holds a list, not options; write `name: value`, one a line"):
        from_yaml(tmp_path, "- a")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    with pytest.raises(UserError, match="not YAML that can be read; write `name: value`, in UTF-8"):
        load_config(Config, tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no `model`; give --model, or `model` in the configuration file"),
        ("--model m --steps x", "--steps: `steps` must be a whole number, not 'x'"),
        ("--model m --rate nan", "--rate: `rate` must be a number, not 'nan'"),
        ("--model m --steps " + "9" * 5000, "--steps: `steps` must be a whole number, not '999"),
        ("--model m --rate 1__0", "--rate: `rate` must be a number, not '1__0'"),
        ("--model m --scorer polcy", "--scorer: unknown `scorer` 'polcy'; did you mean policy?"),
        ("--model m --algorithm gppo", "--algorithm: unknown algorithm 'gppo'; did you mean"),
        ("--model m --algorithm grpo --gae-lambda 1", "--gae-lambda: `gae_lambda` is an option of ppo, not of grpo"),
        ("--model m --normalise batch", "--normalise: `normalise` is an option of grpo, not of ppo; leave it out or"),
        ("--model m --no-lora --lora-rank 3", "--no-lora: contradicts --lora-rank; leave one of them out"),
        ("--model m --betas 1", "--betas: `betas` must be a list of 2"),
    ],
)
def test_each_fault_of_a_flag_names_the_flag(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_flags(line)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_faults_are_reported_together_but_no_more_than_twenty(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        from_yaml(tmp_path, "steps: x\nsampling: {temperature: 0}\nscorre: 1\n", **{"rate": "y"})
    told = str(caught.value).splitlines()
    assert len(told) == 5
    for part in ("unknown option 'scorre'", "no `model`", "`steps` must", "--rate: `rate` must", "is not above 0"):
        assert any(part in line for line in told), part
    with pytest.raises(UserError) as caught:
        from_yaml(tmp_path, "model: m\n" + "".join(f"x{i}: 1\n" for i in range(25)))
    assert len(str(caught.value).splitlines()) == 21 and str(caught.value).endswith("… and 5 more")


def test_an_override_that_is_no_option_is_told() -> None:
    with pytest.raises(UserError, match=r"unknown option 'sampling\.top'; did you mean sampling\.top_k"):
        load_config(Config, None, {"model": "m", "sampling.top": 1})


@dataclass(frozen=True)
class Tuned:
    algorithm: PPO | GRPO = PPO(clip=0.5)


def test_the_default_variant_keeps_its_own_values_and_another_does_not_take_them() -> None:
    assert load_config(Tuned, None, {"algorithm.gae_lambda": 1}).algorithm == PPO(1.0, 0.5)
    assert load_config(Tuned, None, {"algorithm": "ppo"}).algorithm == PPO(clip=0.5)
    assert load_config(Tuned, None, {"algorithm": "grpo"}).algorithm == GRPO()


@dataclass(frozen=True)
class Picky:
    model: str = "m"

    def __post_init__(self) -> None:
        raise UnsupportedModel("no")


def test_an_error_of_post_init_keeps_its_kind() -> None:
    with pytest.raises(UnsupportedModel, match="no"):
        load_config(Picky)


@dataclass(frozen=True)
class Needs:
    deep: Needy
    pick: PPO | GRPO


@dataclass(frozen=True)
class Needy:
    value: int


def test_what_is_missing_below_a_group_is_named() -> None:
    with pytest.raises(UserError) as caught:
        load_config(Needs)
    assert "no `deep.value`; give --value, or" in str(caught.value) and "no `pick`; give --pick" in str(caught.value)
    assert load_config(Needs, None, {"deep.value": "3", "pick": "grpo"}) == Needs(Needy(3), GRPO())
    with pytest.raises(UserError, match=r"`pick` has no name; write \{name: ppo \| grpo, …\}"):
        load_config(Needs, None, {"deep.value": "3", "pick.clip": 0.1})


def test_the_help_shows_docstrings_defaults_and_variants() -> None:
    parser = argparse.ArgumentParser(prog="x", usage=None)
    add_arguments(lambda option: parser, Config)
    text = " ".join(parser.format_help().split())
    assert "--steps N Updates in all. (default: 100)" in text
    assert "--gae-lambda X Decay of the advantage estimate. (with ppo) (default: 0.95)" in text
    assert "--clip X Clip range, 100% = 1.0. (with ppo, grpo) (default: 0.2; grpo: 0.25)" in text
    assert "--algorithm {ppo,grpo,reinforce}" in text and "(default: ppo)" in text
    assert "--scorer {reference,policy}" in text
    assert "--reward TEXT|{KEY:VALUE}" in text
    assert "--model TEXT A folder or hub id. --output PATH" in text
    assert "--lora, --no-lora" in text and "--verbose, --no-verbose" in text


def test_two_fields_of_one_name_get_flags_that_differ() -> None:
    flags = {option.path: option.flag for option in options(Config)}
    assert (flags["seed"], flags["sampling.seed"]) == ("--seed", "--sampling-seed")
    assert flags["sampling.top_k"] == "--top-k" and flags["lora.rank"] == "--lora-rank"


def test_the_dump_names_the_variant_and_resolves_every_default() -> None:
    found = to_dict(Config("m", algorithm=GRPO(), lora=Lora(2, ("q",))))
    assert found["algorithm"] == {"name": "grpo", "clip": 0.25, "normalise": "group"}
    assert found["lora"] == {"rank": 2, "targets": ["q"]}
    assert found["output"] == "out" and found["rate"] == 1e-5
    assert list(found)[:3] == ["model", "output", "steps"]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12) | st.sampled_from(
    ["1e-5", "no", "null", "3", "{a: 1}", ".inf", "~", "- x", "a: b", "2020-01-01", "0x1f", "\u2028", "#", "<<"]
)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
CONFIGS = st.builds(
    Config,
    model=TEXT,
    output=st.sampled_from([Path("a/b"), Path("/x y"), Path("3")]),
    steps=st.integers(),
    rate=NUMBER,
    verbose=st.booleans(),
    betas=st.tuples(NUMBER, NUMBER),
    tags=st.lists(TEXT, max_size=3),
    reward=TEXT | st.dictionaries(TEXT, NUMBER, max_size=3),
    budget=st.none() | st.integers() | NUMBER,
    extra=st.dictionaries(
        TEXT, st.recursive(TEXT | NUMBER | st.booleans(), lambda s: st.lists(s, max_size=2)), max_size=2
    ),
    algorithm=st.builds(PPO, NUMBER, NUMBER) | st.just(GRPO(0.5, "batch")) | st.builds(Reinforce, st.booleans()),
    sampling=st.builds(Sampling, st.floats(0.1, 9), st.none() | st.integers(), st.integers()),
    lora=st.none() | st.builds(Lora, st.integers(), st.tuples(TEXT, TEXT)),
)


@settings(max_examples=100, deadline=None)
@given(config=CONFIGS)
@example(config=Config("\x85 \u2028\ufeff\x1b\r", tags=["\r\n", " a ", "\t"]))
def test_a_dump_reads_back_equal(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8", newline="")
    assert load_config(Config, path) == config


@dataclass(frozen=True)
class Bounded:
    steps: Annotated[int, AtLeast(1)] = 100
    share: Annotated[float, Above(0), AtMost(1)] = 0.5
    jobs: Annotated[int, AtLeast(2)] | None = None
    keep: Literal["best", "all"] = "best"
    rate: Annotated[float, AtLeast(0)] = 0.0
    plain: float = 0.0

    def __post_init__(self) -> None:
        check(self, *([UserError("share of one step", fix="take more steps")] if self.steps == 7 else []))


@dataclass(frozen=True)
class Outer:
    inner: Bounded = Bounded()


@pytest.mark.parametrize(
    ("name", "bad", "good", "message"),
    [
        ("steps", [0, -1], [1, 10], "set it to 1 or above"),
        ("share", [0.0, 1.1, float("nan")], [1e-9, 1.0], "set it above 0, at most 1"),
        ("jobs", [1], [2, None], "set it to 2 or above"),
        ("keep", ["bst"], ["all"], "keep` 'bst'; did you mean best?"),
        ("plain", [float("inf"), float("nan")], [-1e9, 1e9], "set it to a finite number"),
        ("rate", [-0.1, float("inf"), float("nan")], [0.0, 1e9], "set it to 0 or above, finite"),
    ],
)
def test_a_bound_holds_in_python_in_a_file_and_in_a_flag(
    tmp_path: Path, name: str, bad: list[Any], good: list[Any], message: str
) -> None:
    path = tmp_path / "run.yaml"
    for value in good:
        made = Bounded(**{name: value})
        assert getattr(made, name) == value
        path.write_text(dump_yaml(Outer(made)))
        assert load_config(Outer, path).inner == made
    for value in bad:
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            Bounded(**{name: value})
        if value == value:  # NaN is no number in a file, whatever the bounds
            path.write_text(f"inner:\n  {name}: {str(value).replace('inf', '.inf')}\n")
            with pytest.raises(UserError) as caught:
                load_config(Outer, path)
            assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)
            with pytest.raises(UserError) as caught:
                load_config(Outer, None, {f"inner.{name}": str(value)})
            assert str(caught.value).startswith(f"--{name}: ") and message in str(caught.value)


def test_all_bounds_that_are_broken_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^steps is 0; .*; share is 2; set it above 0, at most 1$"):
        Bounded(steps=0, share=2)
    with pytest.raises(UserError, match=r"^share is 2; .*; share of one step; take more steps$"):
        Bounded(steps=7, share=2)
    with pytest.raises(UserError) as caught:
        load_config(Outer, None, {"inner.steps": 0, "inner.share": 0, "inner.rate": "x"})
    assert len(str(caught.value).splitlines()) == 3
