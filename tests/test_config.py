"""Settings: strict, all mistakes in one line, nothing declared that nobody reads."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dist_train.config import Settings
from dist_train.config_file import load_settings
from dist_train.config_help import describe_settings, may_change
from dist_train.data.manifest import source_identity
from dist_train.errors import UserError
from tests.config_schemas import FOLDER, SCHEMAS, schema_of
from tests.readme_settings import settings_table

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "grid:" not in path.read_text())


def load(tmp_path: Path, text: str, *overrides: str) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_settings(path, overrides)


def mistake(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_what_it_is_for(path: Path) -> None:
    load_settings(path)
    assert path.read_text().startswith("# ")


def test_every_setting_has_a_meaning_and_is_read_somewhere() -> None:
    read = set()
    for path in (ROOT / "dist_train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and path.name not in ("config.py", "sections.py"):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                read.add((name, node.attr))
    # What makes the data's identity goes into the manifest by name.
    named = source_identity(load_settings(CONFIGS[0]).data)
    for dotted, _, meaning in describe_settings():
        section, _, key = dotted.partition(".")
        assert meaning.endswith((".", ")")), f"{dotted} has no docstring"
        is_read = {(section, key), ("settings", key)} & read or (section == "data" and key in named)
        through_method = dotted in ("run.seed", "loss.last_k")  # as `derive_seed` and `Settings.last_k`
        assert is_read or through_method, f"nobody reads {dotted}"


def test_the_readme_shows_the_settings_as_they_are() -> None:
    assert settings_table() in (ROOT / "README.md").read_text(), "run `make readme`"


def test_model5_is_the_recipe_to_the_letter() -> None:
    settings = load_settings(ROOT / "configs/model5.yaml")
    model, optim, train = settings.model, settings.optim, settings.train
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (12, 12, 768, 256)
    assert (model.bias, model.dropout, model.activation, model.norm_eps) == (True, 0.1, "gelu", 1e-5)
    assert (model.initialization, model.logit_scale) == ("model5", "rsqrt_n_embd")
    assert settings.last_k == 1
    assert (optim.name, optim.learning_rate, optim.lr_schedule, optim.warmup_iters) == ("adamw", 1e-3, "constant", 0)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.decay) == (0.9, 0.999, 0.01, "all")
    assert optim.grad_clip is None
    assert (train.global_batch_size, train.max_iters, settings.eval.interval) == (64, 1234, 80)
    sample = settings.sample
    assert (sample.prompt, sample.temperature, sample.max_new_tokens) == ("I went on holiday to Liliput and", 1.1, 100)
    data = settings.data
    assert (data.source, data.max_documents, data.val_fraction, data.tokenizer) == ("fineweb", 1000, 0.1, "gpt2")


def test_the_all_token_recipe_differs_in_last_k_alone() -> None:
    final, every = (load_settings(ROOT / f"configs/{name}.yaml") for name in ("model5", "model5_all_tokens"))
    changed = every.model_copy(update={"loss": final.loss, "run": final.run})
    assert changed == final
    assert every.last_k == 256


def test_overrides_win_in_their_order_and_keep_text_as_text(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "optim: {learning_rate: 0.5}",
        "--optim.learning_rate=3e-4",
        "--train.max_iters=7",
        "--train.max_iters=8",
        "--loss.last_k=all",
        "--optim.grad_clip=null",
        "--sample.prompt=123: [x",
        "--run.out_dir=2026",
    )
    assert settings.optim.learning_rate == 3e-4
    assert settings.train.max_iters == 8
    assert settings.last_k == settings.model.block_size
    assert settings.optim.grad_clip is None
    assert settings.sample.prompt == "123: [x"
    assert settings.run.out_dir == Path("2026")


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ([], "data/python-docs-gpt2"),
        (["--data.source=fineweb", "--data.max_documents=1000"], "data/fineweb-1000-gpt2"),
        (["--data.source=files", "--data.path=../books/*.txt", "--data.tokenizer=bytes"], "data/files-bytes"),
        (["--data.source=files", "--data.path=~/My book.txt"], "data/files-My_book-gpt2"),
        (["--data.dir=mine"], "mine"),
    ],
)
def test_the_folder_of_prepared_data_is_named_after_what_decides_its_tokens(
    tmp_path: Path, overrides: list[str], folder: str
) -> None:
    assert load(tmp_path, "", *overrides).data.dir == Path(folder)


def test_resolved_settings_read_back_as_they_were(tmp_path: Path, tiny: Callable[..., Settings]) -> None:
    settings = tiny({"sample.prompt": "no: 3e-4 'x' # y", "optim.eps": "1e-7", "optim.grad_clip": "null"})
    assert load(tmp_path, settings.to_yaml()) == settings


def test_scalars_are_read_as_yaml_1_2_has_them(tmp_path: Path) -> None:
    settings = load(tmp_path, "optim: {learning_rate: 3e-4, eps: .1}\nsample: {prompt: no}\nrun: {seed: 010}")
    assert (settings.optim.learning_rate, settings.optim.eps) == (3e-4, 0.1)
    assert settings.sample.prompt == "no"
    assert settings.run.seed == 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {max_iter: 5}", "train.max_iter: unknown key; did you mean max_iters?"),
        ("trian: {max_iters: 5}", "trian: unknown key; did you mean train?"),
        ("train: {max_iters: 5.5}", "train.max_iters"),
        ("train: {max_iters: '5'}", "train.max_iters"),
        ("train: {max_iters: true}", "train.max_iters"),
        ("train: {max_iters: 0}", "train.max_iters"),
        ("train: 5", "train"),
        ("model: {bias: no}", "model.bias"),
        ("optim: {learning_rate: .inf}", "optim.learning_rate"),
        ("optim: {learning_rate: 1e999}", "optim.learning_rate"),
        ("train: {max_iters: 5}\ntrain: {max_iters: 6}", "given twice"),
        ("train: {max_iters: 5, max_iters: 6}", "given twice"),
        ("train: [", "not valid YAML"),
        ("- 1", "no sections"),
        ("1: 2", "not text"),
        ("model: {n_embd: 30, n_head: 4}", "n_embd=30 is not a multiple of n_head=4"),
        ("loss: {last_k: 300}", "loss.last_k=300 is more than model.block_size=256"),
        ("loss: {last_k: 0}", "loss.last_k"),
        ("loss: {last_k: some}", "loss.last_k"),
        ("data: {source: files}", "data.path"),
        ("data: {source: book}", "data.source"),
        ("optim: {lr_schedule: cosine, warmup_iters: 5}\ntrain: {max_iters: 5}", "optim.warmup_iters=5"),
        ("optim: {lr_schedule: cosine, decay_iters: 5}", "optim.decay_iters goes with optim.lr_schedule: wsd"),
        ("model: {dropout: 1.0}", "model.dropout"),
        ("run: {out_dir: null}", "run.out_dir"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in mistake(tmp_path, text)


def test_all_mistakes_of_file_and_command_line_come_at_once(tmp_path: Path) -> None:
    answer = mistake(tmp_path, "train: {max_iter: 5}\nmodel: {n_layer: -1}", "--optim.beta1=x", "--eval", "--log.x=1")
    for key in ("train.max_iter:", "model.n_layer:", "optim.beta1:", "'--eval'", "log.x:"):
        assert key in answer


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("nowhere.yaml")):
        load_settings(tmp_path / "nowhere.yaml")


def test_what_may_change_when_a_run_goes_on_is_declared_with_each_setting() -> None:
    changeable = {key for key, _, _ in describe_settings() if may_change(key)}
    sections = {"eval", "sample", "checkpoint", "runtime", "log"}
    single = {"run.out_dir", "train.max_iters", "train.micro_batch_size"}
    data = {"data.dir", "data.path", "data.workers", "data.on_bad_document"}
    whole = {key for key, _, _ in describe_settings() if key.partition(".")[0] in sections}
    assert changeable == whole | single | data


def test_derived_seeds_differ_by_purpose_step_and_seed(tiny: Callable[..., Settings]) -> None:
    run, other = tiny().run, tiny({"run.seed": 1}).run
    seeds = [
        run.derive_seed("weights"),
        run.derive_seed("windows"),
        run.derive_seed("dropout", 0, 0),
        run.derive_seed("dropout", 0, 1),
        run.derive_seed("dropout", 1, 0),
        other.derive_seed("weights"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert run.derive_seed("dropout", 0, 1) == seeds[3]
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_schema_is_that_of_the_code(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == schema_of(SCHEMAS[path]), "make schema"


@pytest.mark.parametrize("config", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_names_its_schema_in_its_first_line_and_fits_it(config: Path) -> None:
    text = config.read_text(encoding="utf-8")
    schema = FOLDER / text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    jsonschema.validate(yaml.safe_load(text), json.loads(schema.read_text(encoding="utf-8")))


@pytest.mark.parametrize("mistake", [{"loss": {"last_q": 1}}, {"loss": {"last_k": 0}}, {"data": {"source": "attic"}}])
def test_a_schema_finds_mistakes(mistake: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(mistake, json.loads(schema_of(Settings)))
