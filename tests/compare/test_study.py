"""Which runs a comparison consists of, how it chooses learning rates, stops, and goes on."""

import dataclasses
import json

import pytest

from qlora_jax.compare.study import Study, check_study, start_study
from qlora_jax.config import DataSection, ModelSection
from qlora_jax.run.compare import Stopped, downhill
from qlora_jax.training.loop import Diverged
from tests.compare.study import CONFIG, Trainer, outcomes


def changed(**data):
    return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **data))


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(CONFIG, tmp_path / "out", "default")


@pytest.mark.parametrize(
    ("losses", "asked"),
    [
        ([9, 4, 3, 5], [1, 2, 3]),  # the third is lowest: one step beyond it
        ([9, 5, 4, 3], [1, 2, 3]),
        ([5, 3, 4, 9], [0, 1, 2]),
        ([1, 3, 4, 9], [0, 1, 2]),
        ([1, float("inf"), float("inf"), 9], [0, 1, 2]),  # what diverges sends to lower rates
    ],
)
def test_the_grid_is_walked_downhill(losses, asked):
    found = downhill(4, losses.__getitem__)
    assert sorted(found) == asked
    assert all(found[index] == losses[index] for index in found)


def test_the_runs_of_a_method_are_ordinary_ones(study, tmp_path):
    qlora = study.methods[0]
    first, *_, last = study.finals(qlora, 3e-3)
    assert first.folder == tmp_path / "out/runs/qlora-seed7" and last.folder == tmp_path / "out/runs/qlora-seed9"
    assert (first.config.method, last.seed, last.rate) == ("qlora", 9, 3e-3)
    assert first.config.data.eval == "test.jsonl" and first.config.data.exact_match
    assert (first.config.train.steps, first.config.train.eval_every) == (40, 0)
    search = study.searches(qlora)
    assert [run.rate for run in search] == pytest.approx([1e-3, 3e-3, 1e-2, 3e-2])
    assert {run.config.data.eval for run in search} == {"validation.jsonl"}
    assert {(run.seed, run.config.train.steps, run.config.data.exact_match) for run in search} == {(7, 20, False)}
    assert search[0].folder == tmp_path / "out/search/qlora-0.001"


def test_only_weights_that_are_trained_are_kept_in_float32(tmp_path):
    study = Study(dataclasses.replace(CONFIG, model=ModelSection(path="base", dtype="bf16")), tmp_path, "default")
    dtypes = {method.name: study.finals(method, 1e-2)[0].config.model.dtype for method in study.methods}
    assert dtypes == {"qlora": "bf16", "lora": "bf16", "full": "fp32"}


def test_in_a_hurry_one_seed_trains_less(tmp_path):
    train = dataclasses.replace(CONFIG.train, steps=None, epochs=2.0)
    study = Study(dataclasses.replace(CONFIG, train=train), tmp_path, "quick")
    assert study.searches(study.methods[0])[0].config.train.epochs == 0.25
    assert study.finals(study.methods[0], 1e-2)[0].config.train.epochs == 1.5
    assert study.seeds == [7]


def test_ablations_leave_out_what_is_there_already(tmp_path):
    study = Study(CONFIG, tmp_path, "ablations")
    assert [method.name for method in study.methods] == [
        *("qlora", "lora", "full", "qlora-single", "lora-fp4-e2m1", "lora-fp4-e3m0", "lora-int4"),
        *("qlora-r1", "qlora-r2", "qlora-r4", "qlora-r8", "qlora-r32", "qlora-r64", "qlora-qv"),
    ]
    by_name = {method.name: study.finals(method, 1e-2)[0].config for method in study.methods}
    assert (by_name["qlora-r4"].lora.rank, by_name["qlora-r4"].lora.alpha) == (4, 8)
    assert by_name["qlora-single"].quant.double is False
    assert by_name["qlora-qv"].lora.targets == ("q_proj", "v_proj")
    assert (by_name["lora-int4"].method, by_name["lora-int4"].model.path) == ("lora", str(tmp_path / "bases/int4"))


def test_each_method_trains_at_its_own_best_rate(study):
    train = Trainer()
    found = list(outcomes(study, train))
    assert {one.method.name: one.rate for one in found} == pytest.approx({"qlora": 1e-2, "lora": 1e-2, "full": 3e-3})
    assert found[2].search == pytest.approx({1e-3: 2e-3, 3e-3: 0.0, 1e-2: 7e-3})
    assert len(train.asked) == 3 * (3 + 3)


def test_a_rate_that_diverges_is_not_chosen(study):
    diverges = {("qlora", rate) for rate in study.rates[1:]}
    found = next(outcomes(study, Trainer(diverges=diverges)))
    assert found.rate == study.rates[0]
    diverges.add(("qlora", study.rates[0]))
    other = Study(CONFIG, study.out.with_name("other"), "default")
    with pytest.raises(Diverged, match=r"QLoRA diverged at 0\.001 and higher: lower optim\.learning_rate"):
        list(outcomes(other, Trainer(diverges=diverges)))


def test_a_stopped_comparison_goes_on_where_it_was(study):
    check_study(study)
    start_study(study)
    with pytest.raises(Stopped) as stopped:
        list(outcomes(study, Trainer(stops_at=5)))
    assert stopped.value.code == 143
    check_study(study)
    train = Trainer()
    list(outcomes(study, train))
    assert len(train.asked) == 18 - 4  # four runs were done
    assert train.asked[0].output_dir.endswith("runs/qlora-seed8")


def test_a_finished_run_of_another_configuration_is_not_taken(study):
    list(outcomes(study, Trainer()))
    record = study.out / "runs/lora-seed8/config.json"
    record.write_text(record.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.5'))
    with pytest.raises(ValueError, match=r"holds another run \(optim.learning_rate was 0.5, now 0.01\)"):
        list(outcomes(study, Trainer()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            changed(eval=""),
            r"config\.data\.eval='': a comparison needs rows to choose learning rates on; name them with",
        ),
        (changed(eval=0.1), r"config\.data\.eval=0\.1: a comparison needs rows to choose learning rates on"),
        (changed(test=""), r"config\.data\.test='': a comparison needs rows to measure the methods on; name them with"),
        (changed(test="validation.jsonl"), "are both 'validation.jsonl': learning rates are chosen on the first, so"),
        (
            dataclasses.replace(CONFIG, model=ModelSection(weights="random", geometry="x")),
            r"config\.model\.weights='random': a comparison starts from a trained base",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_study(Study(config, tmp_path / "out", "default"))
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused(study, tmp_path):
    study.out.mkdir()
    check_study(study)  # an empty one will do
    (study.out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="out is not empty and holds no comparison: choose another folder"):
        check_study(study)
    (study.out / "thesis.txt").unlink()
    start_study(study)
    assert json.loads((study.out / "study.json").read_text())["mode"] == "default"
    with pytest.raises(ValueError, match=r"holds another comparison \(mode was 'default', now 'quick'\): choose"):
        check_study(Study(CONFIG, study.out, "quick"))
    data = DataSection(train="other.jsonl", eval="validation.jsonl", test="test.jsonl", exact_match=True)
    with pytest.raises(ValueError, match=r"holds another comparison \(data was"):
        check_study(Study(dataclasses.replace(CONFIG, data=data), study.out, "default"))
