"""Zero-shot tasks: local rows must give the harness's own prompts, choices and answers, row for row."""

import json
from pathlib import Path

import pytest

from stages.errors import UsageError
from stages.in_memory import NullCallbacks
from stages.metrics.harness_tasks import LAYOUT, TaskData, render
from stages.metrics.zero_shot import TASKS, TaskResult, ZeroShot, check_tasks, mean_of
from stages.models.resolve import resolve
from tests.small_models import save
from tests.task_rows import HUB_ROWS, STOCK, write_rows

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def _datasets_cache_of_its_own(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def task_data(tmp_path) -> TaskData:
    return TaskData.at(write_rows(tmp_path / "rows"))


def built(task, docs):
    """What the harness makes of rows: prompts, choices and answers."""
    return [(task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)) for doc in docs]


def stock(name):
    """The harness's own task on rows in the hub's form, which would otherwise come from the hub."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    path, split = STOCK[name]
    config = {key: value for key, value in load_yaml(path).items() if key not in ("tag", "group")}
    config |= {f"{other}_split": None for other in ("training", "validation", "test") if other != split}
    rows = datasets.DatasetDict({config[f"{split}_split"]: datasets.Dataset.from_list(HUB_ROWS[name])})
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: rows})


@pytest.mark.parametrize("name", TASKS)
def test_local_rows_give_the_prompts_of_the_stock_task(task_data, name):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(render(task_data)), include_defaults=False)
    local, own = manager.load([name])["tasks"][name], stock(name)
    found = built(local, local.eval_docs)
    assert found == built(own, own.eval_docs)
    assert len(found) == len(HUB_ROWS[name])
    for setting in ("output_type", "metric_list", "target_delimiter", "fewshot_delimiter", "description"):
        assert getattr(local.config, setting) == getattr(own.config, setting)
    assert local.config.metadata["version"] == own.config.metadata["version"]


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("boolq", "winogrande")])
def test_rows_in_the_hubs_form_are_taken_as_they_are(name):
    import datasets

    from stages.metrics.harness_tasks import rows

    convert = getattr(rows, name.replace("_easy", "").replace("_challenge", ""))
    found = convert(datasets.Dataset.from_list(HUB_ROWS[name]))
    own = stock(name)
    assert built(own, found) == built(own, own.eval_docs)


def test_a_label_that_is_none_is_an_error():
    import datasets

    from stages.metrics.harness_tasks import rows

    broken = datasets.Dataset.from_list([{"question": "q", "passage": "p", "label": "yes"}])
    with pytest.raises(UsageError, match="a row of boolq has the label 'yes'"):
        rows.boolq(broken)


@pytest.mark.long
def test_a_small_model_is_measured(tmp_path, task_data):
    model = ZeroShot(resolve(str(save(tmp_path / "m", "llama"))), "cpu")
    found = model.measure("arc_easy", task_data, 2, NullCallbacks())
    assert isinstance(found, TaskResult)
    assert (found.num_rows, found.num_rows_available, found.is_partial) == (2, 3, True)
    assert set(found.metrics) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert found.metrics["acc"] in (0.0, 0.5, 1.0)
    whole = model.measure("boolq", task_data, None, NullCallbacks())
    assert not whole.is_partial
    assert "acc_norm" not in whole.metrics


def test_the_mean_is_over_the_tasks_that_have_the_metric():
    metrics = [{"acc": 0.5}, {"acc": 0.7, "acc_norm": 0.8}]
    assert mean_of(metrics, "acc") == (pytest.approx(0.6), 2)
    assert mean_of(metrics, "acc_norm") == (0.8, 1)
    assert mean_of(metrics, "f1") is None


def test_what_is_missing_is_said(tmp_path, task_data):
    with pytest.raises(UsageError, match="no such folder"):
        TaskData.at(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds rows of no task; expected: boolq/val\.jsonl"):
        TaskData.at(tmp_path)
    (task_data.folder / LAYOUT["boolq"]).unlink()
    with pytest.raises(UsageError, match=r"has no rows of boolq; expected: boolq/val\.jsonl"):
        check_tasks(["boolq"], task_data)
    (task_data.folder / "hellaswag" / "val2.jsonl").touch()
    with pytest.raises(UsageError, match="2 files with rows"):
        check_tasks(["hellaswag"], task_data)
    with pytest.raises(UsageError, match="piqa has no local form"):
        check_tasks(["piqa"], task_data)
    assert sorted(path.stem for path in render(task_data).glob("*.yaml")) == sorted(set(TASKS) - {"boolq", "hellaswag"})


def test_without_the_harness_it_is_said_how_to_get_it(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install lm-eval"):
        check_tasks(["boolq"], None)


def test_odd_folder_names_survive_rendering(tmp_path):
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = write_rows(tmp_path / 'a "b": #c')
    rendered = render(TaskData.at(folder)) / "boolq.yaml"
    config = load_yaml(rendered, resolve_func=False)
    assert Path(config["dataset_kwargs"]["data_files"]["validation"]) == folder / "boolq" / "val.jsonl"
    assert json.dumps(config["doc_to_choice"]) == '["no", "yes"]'
