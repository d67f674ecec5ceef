"""The configuration: types, ranges, overrides, files and JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

from qlora_jax import config as module
from qlora_jax.cli import arguments
from qlora_jax.cli import main as command
from qlora_jax.config import (
    Config,
    DataSection,
    LoraSection,
    ModelSection,
    OptimSection,
    QuantSection,
    Section,
    TrainSection,
    from_dict,
    load_config,
    may_change,
    to_dict,
)

BODY = """from qlora_jax.config import *
config = Config(lora=LoraSection(rank=8), train=TrainSection(epochs=3))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(BODY)
    return path


def test_defaults():
    config = Config()
    assert (config.method, config.seed, config.output_dir) == ("qlora", 0, "")
    assert config.lora == LoraSection(rank=16, alpha=16.0, dropout=0.0, targets="all-linear", variant="lora")
    assert (config.train.steps, config.train.epochs) == (None, 1.0)
    assert config.optim.clip == 0.3 and config.quant.double is True


@pytest.mark.parametrize(
    ("text", "section", "field", "value"),
    [
        ("--config.lora.rank=4", "lora", "rank", 4),
        ("--config.lora.alpha=32", "lora", "alpha", 32.0),
        ("--config.optim.learning_rate=1e-4", "optim", "learning_rate", 1e-4),
        ("--config.optim.clip=0", "optim", "clip", 0.0),
        ("--config.data.packing=False", "data", "packing", False),
        ("--config.model.path=a/b=c", "model", "path", "a/b=c"),
        ("--config.model.max_position=4096", "model", "max_position", 4096),
        ("--config.model.max_position=None", "model", "max_position", None),
        ("--config.lora.targets=q_proj,v_proj", "lora", "targets", ("q_proj", "v_proj")),
        ("--config.lora.targets=q_proj", "lora", "targets", ("q_proj",)),
        ("--config.lora.targets=all-linear", "lora", "targets", "all-linear"),
        (r"--config.lora.targets=.*\.(q|v)_proj", "lora", "targets", r".*\.(q|v)_proj"),
        ('--config.lora.rank_pattern={"q_proj": 2}', "lora", "rank_pattern", {"q_proj": 2}),
        ('--config.lora.alpha_pattern={"q_proj": 2}', "lora", "alpha_pattern", {"q_proj": 2.0}),
        ("--config.data.eval=0.1", "data", "eval", 0.1),
        ("--config.data.eval=rows.jsonl", "data", "eval", "rows.jsonl"),
        ("--config.train.resume=none", "train", "resume", "none"),
        ("--config.train.resume=200", "train", "resume", 200),
    ],
)
def test_override_takes_the_type_of_the_field(file, text, section, field, value):
    got = getattr(getattr(load_config(file, [text]), section), field)
    assert got == value and type(got) is type(value)


def test_overrides_as_two_words_and_at_the_top_level(file):
    config = load_config(file, ["--config.seed", "7", "--config.method=lora", "--config.lora.rank", "2"])
    assert (config.seed, config.method, config.lora.rank) == (7, "lora", 2)
    assert config.train.epochs == 3.0  # from the file


def test_the_last_override_wins(file):
    assert load_config(file, ["--config.seed=1", "--config.seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "length"), [("steps=5", (5, None)), ("epochs=2", (None, 2.0)), ("epochs=none", (None, 1.0))]
)
def test_a_new_length_replaces_the_files_own(file, override, length):
    config = load_config(file, [f"--config.train.{override}"])
    assert (config.train.steps, config.train.epochs) == length


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "--config.lora.rnk=8",
            "config.lora.rnk is unknown: did you mean config.lora.rank? Known: rank, alpha",
        ),
        ("--config.lorra.rank=8", "config.lorra is unknown: did you mean config.lora? Known: method, seed"),
        ("--config.seed.rank=8", "config.seed.rank is unknown: config.seed has no fields"),
        ("--config.lora=8", "config.lora='8': expected a field of it: --config.lora.rank=value"),
        ("--config.lora.rank=8.5", "config.lora.rank='8.5': expected an integer"),
        ("--config.lora.rank=0", "config.lora.rank=0: expected an integer of at least 1"),
        (
            "--config.lora.dropout=1",
            "config.lora.dropout=1.0: expected a finite number from 0 up to, but not",
        ),
        ("--config.lora.targets=(", "config.lora.targets='(': expected a regular expression, but missing )"),
        ("--config.lora.targets=", "config.lora.targets='': expected a module, or 'all-linear'"),
        ("--config.lora.rank_pattern=8", "config.lora.rank_pattern=8: expected an object"),
        ("--config.optim.learning_rate=nan", "config.optim.learning_rate=nan: expected a finite number"),
        (
            "--config.optim.schedule=step",
            "config.optim.schedule='step': expected 'constant' or 'linear' or 'cosine'",
        ),
        ("--config.optim.moments=int8", "config.optim.moments='int8': expected 'fp32' or 'bf16'"),
        ("--config.optim.gradients=fp16", "config.optim.gradients='fp16': expected 'fp32' or 'bf16'"),
        ("--config.optim.offload=disk", "config.optim.offload='disk': expected 'none' or 'host'"),
        ("--config.optim.learning_rate=inf", "config.optim.learning_rate=inf: expected a finite number"),
        ("--config.data.packing=yes", "config.data.packing='yes': expected true or false"),
        ("--config.data.eval=1.5", "config.data.eval=1.5: expected text or a finite number between 0 and 1"),
        ("--config.train.resume=last", "config.train.resume='last': expected 'auto' or 'none' or an integer"),
        ("--config.seed=-1", "config.seed=-1: expected an integer from 0 to 4294967295"),
        ("--config.seed", "--config.seed has no value: expected --config.seed=value"),
        ("rank=8", "'rank=8': expected --config.section.field=value"),
    ],
)
def test_bad_override(file, text, message):
    with pytest.raises(ValueError) as error:
        load_config(file, [text])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraSection(rnk=8), "config.lora.rnk is unknown: did you mean config.lora.rank?"),
        (lambda: LoraSection(rank=True), "config.lora.rank=True: expected an integer"),
        (lambda: LoraSection(rank_pattern={"q": 0}), "config.lora.rank_pattern={'q': 0}: expected an object"),
        (lambda: OptimSection(clip=-1), "config.optim.clip=-1: expected a finite number of at least 0"),
        (lambda: DataSection(packing=1), "config.data.packing=1: expected true or false"),
        (
            lambda: ModelSection(dtype="int8"),
            "config.model.dtype='int8': expected 'bf16' or 'fp32' or 'fp16'",
        ),
        (
            lambda: TrainSection(steps=5, epochs=1),
            "config.train.steps=5 and config.train.epochs=1.0: expected only",
        ),
        (lambda: Config(lora={"rank": 8}), "config.lora={'rank': 8}: expected LoraSection"),
    ],
)
def test_bad_construction(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["lm_head", "embedding"])
def test_a_storage_that_does_not_exist(name):
    with pytest.raises(ValueError, match=f"config.quant.{name}='int4': expected 'none' or 'nf4' or 'int8'"):
        QuantSection(**{name: "int4"})


def test_gradients_of_a_full_fine_tune_have_the_weights_dtype():
    with pytest.raises(ValueError, match="optim.gradients='bf16' is for adapters: .* which is config.model.dtype"):
        Config(method="full", optim=OptimSection(gradients="bf16"))
    assert Config(method="full", optim=OptimSection(moments="bf16", offload="host")).method == "full"


def test_an_embedding_in_host_memory_is_not_packed():
    with pytest.raises(
        ValueError, match=r"keeps the table in 16 bits .* packs it for the device: set config.model.emb"
    ):
        Config(model=ModelSection(embedding="host"), quant=QuantSection(embedding="int8"))
    assert Config(method="lora", model=ModelSection(embedding="host")).model.embedding == "host"


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_json_round_trip(file):
    config = load_config(file, ["--config.lora.targets=q_proj,v_proj", '--config.lora.rank_pattern={"q_proj":2}'])
    text = json.dumps(to_dict(config))
    assert json.loads(text)["lora"]["targets"] == ["q_proj", "v_proj"]
    assert from_dict(json.loads(text)) == config


def test_json_with_unknown_keys():
    with pytest.raises(ValueError, match="config.lora.rnk is unknown: did you mean config.lora.rank"):
        from_dict({"lora": {"rnk": 8}})
    with pytest.raises(ValueError, match="config.methd is unknown: did you mean config.method"):
        from_dict({"methd": "lora"})


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="config file no/such.py does not exist"):
        load_config("no/such.py")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config = (", "failed: SyntaxError: '(' was never closed"),
        ("import no_such_module", "failed: ModuleNotFoundError: No module named 'no_such_module'"),
        (BODY.replace("rank", "rnk"), "failed: ValueError: config.lora.rnk is unknown: did you mean"),
        ("settings = 1", "expected `config = Config(...)`, found None"),
        ("config = {}", "expected `config = Config(...)`, found {}"),
    ],
)
def test_invalid_file(file, body, message):
    file.write_text(body)
    with pytest.raises(ValueError) as error:
        load_config(file)
    assert str(error.value).startswith(f"config file {file}") and message in str(error.value)


def test_geometry_is_relative_to_the_config_file(file):
    config = load_config(file, ["--config.model.geometry=geometry/tiny.json"])
    assert config.model.geometry == str(file.parent / "geometry" / "tiny.json")


def test_every_field_has_a_description():
    sections: list[type[Section]] = [Config, *module.SECTIONS.values()]
    text = arguments.config_help()
    for section in sections:
        for item in dataclasses.fields(section):
            assert item.metadata["help"]
            if section is not Config:
                assert f"--{section.PREFIX}.{item.name} " in text
    assert "  --config.optim.clip" in text and "0 turns clipping off [0.3]" in text


def test_arguments_beside_the_config(file):
    parser = arguments.config_parser("train.py", "Fine-tune.")
    parser.add_argument("--gpu")
    words = ["--config.lora.rank", "4", "--config", str(file), "--gpu", "t4", "--config.seed=3"]
    options, config = arguments.parse_with_config(parser, words)
    assert (options.gpu, config.lora.rank, config.seed) == ("t4", 4, 3)


def test_bad_input_ends_the_command_with_one_line(file, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.parse_with_config(
            arguments.config_parser("train.py", ""), ["--config", str(file), "--config.lora.rank=x"]
        )
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train.py: error: config.lora.rank='x': expected an integer\n"


def test_help_lists_the_fields(capsys):
    with pytest.raises(SystemExit):
        arguments.parse_with_config(arguments.config_parser("train.py", "Fine-tune."), ["--help"])
    assert "--config.train.grad_accum" in capsys.readouterr().out


def test_qlora_jax_passes_the_rest_to_the_command(monkeypatch):
    class Fake:
        @staticmethod
        def main(argv):
            return len(argv)

    asked = []
    monkeypatch.setattr(command.importlib, "import_module", lambda name: asked.append(name) or Fake)
    assert command.main(["train", "--help", "--config.seed=1"]) == 2
    assert asked == ["qlora_jax.cli.train"]


def test_qlora_jax_refuses_an_unknown_command(capsys):
    with pytest.raises(SystemExit):
        command.main(["trian"])
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_a_configuration_of_an_earlier_version_still_loads(tmp_path):
    file = tmp_path / "old.py"
    file.write_text(
        "from qlora_jax.train.config import Config, LoraSection\nconfig = Config(lora=LoraSection(rank=3))\n"
    )
    assert load_config(file).lora.rank == 3


def test_what_may_change_when_a_run_goes_on():
    """Literally: a field that is added is fixed unless it says otherwise."""
    assert may_change("free") == {
        *("output_dir", "model.kernels", "optim.offload"),
        *("data.samples", "data.test", "data.test_split", "data.eval_split", "data.cache", "data.max_bad_rows"),
        *("train.steps", "train.epochs", "train.save_every", "train.eval_every", "train.eval_rows", "train.log_every"),
        *("train.remat", "train.mlp_chunk", "train.loss_chunk", "train.vocab_chunk"),
        *("train.keep", "train.keep_best", "train.resume", "train.resume_with"),
    }
    assert may_change("said") == {
        *("data.train", "data.eval", "data.split", "data.packing", "data.train_on", "data.long_rows"),
        *("data.chat_template", "data.exact_match", "train.batch_size", "train.grad_accum", "train.seq_len"),
        *("optim.learning_rate", "optim.schedule", "optim.warmup_ratio", "optim.weight_decay", "optim.clip"),
    }
