"""Methods, plans, selection and tables of a comparison, and the text of its report."""

import json
import math
import re
from pathlib import Path

import pytest

from vpt.compare.__main__ import read_options
from vpt.compare.costs import Cost
from vpt.compare.methods import METHODS, Method, choose_methods
from vpt.compare.plan import Plan, Trial
from vpt.compare.report import TEMPLATE, disagreement, most_disputed, to_html
from vpt.compare.runs import Outcome, Row, _choose
from vpt.compare.table import Spread, _write_table, describe_table, table_columns
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.schema import schema_keys
from vpt.config.validation import to_config

DATA = ["dataset=folder", "dataset.root=photos"]
BOXES = ["dataset=boxes", "dataset.root=x"]


def plan_of(*names, words=DATA, seeds=(0, 1), rates=(1.0,), shots=(None,), **defined):
    return Plan(tuple(words), choose_methods(names, defined), seeds, rates, shots)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("data", [DATA, pytest.param(BOXES, marks=pytest.mark.slow)], ids=["classes", "boxes"])
def test_every_method_is_a_config_and_its_search_has_learning_rates(name, data):
    method = METHODS[name]
    to_config(compose_config([*data, *method.overrides]))
    rates = plan_of(name, words=data).rates_of(name)
    assert rates
    assert set(rates) <= set(schema_keys())


@pytest.mark.slow
def test_no_two_methods_are_the_same():
    configs = [to_config(compose_config(method.overrides)) for method in METHODS.values()]
    assert all(one != other for index, one in enumerate(configs) for other in configs[:index])
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


def test_all_methods_that_need_no_package_are_the_default(monkeypatch):
    foreign = {**METHODS, "far": Method("far", ("tuning=bias",), needs="no_such_package")}
    monkeypatch.setattr("vpt.compare.methods.METHODS", foreign)
    assert [*choose_methods([], {})] == [name for name, method in METHODS.items() if not method.needs]
    assert [*choose_methods(["mine", "bias"], {"mine": "prompt=none"})] == ["mine", "bias"]
    assert [*choose_methods(["bias"], {"mine": "prompt=none"})] == ["bias", "mine"]  # also if not named
    with pytest.raises(ConfigError, match="no_such_package"):
        choose_methods(["far"], {})


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("prompt=deep prompt.num_tokens=50", ["optim.prompt_lr"]),
        ("prompt=none", ["optim.head_lr"]),
        ("tuning=linear", ["optim.head_lr"]),
        ("tuning=partial 'tuning.num_blocks=2'", ["tuning.lr"]),
        ("tuning=prompt_bias prompt=shallow", ["optim.prompt_lr", "tuning.lr"]),
        ("tuning=prompt_bias prompt=none", ["tuning.lr"]),
    ],
)
def test_the_search_multiplies_the_learning_rates_in_use(text, rates):
    plan = plan_of("mine", mine=text)
    assert [*plan.rates_of("mine")] == rates
    assert plan.methods["mine"].overrides == tuple(text.replace("'", "").split())


def test_the_seed_also_splits_the_data_unless_typed():
    trial = Trial("bias", 5, 3, 1.0)
    assert plan_of("bias").words_of(trial) == [
        *(*DATA, "tuning=bias", "seed=3", "dataset.split_seed=3", "dataset.num_per_class=5")
    ]
    typed = plan_of("bias", words=[*DATA, "dataset.split_seed=7"]).compose(trial)[0]
    assert (typed.seed, typed.dataset.split_seed) == (3, 7)


def test_a_rate_multiplies_the_configured_learning_rates():
    plan = plan_of("bias", "prompt_deep", words=[*DATA, "tuning.lr=4e-3"], rates=(0.3, 1.0))
    assert plan.compose(Trial("bias", None, 0, 0.3))[0].tuning.lr == pytest.approx(1.2e-3)
    prompted = plan.compose(Trial("prompt_deep", "all", 0, 0.3))[0]
    assert (prompted.optim.prompt_lr, prompted.optim.head_lr) == (pytest.approx(3e-3), 1e-3)
    assert prompted.dataset.num_per_class is None
    assert plan.num_runs == 2 * (2 + 1)


def test_short_names_mean_the_key_of_each_method_and_a_key_that_no_method_reads_is_refused():
    plan = plan_of("bias", "prompt_deep", words=[*DATA, "lr=4e-3", "prompt.num_tokens=3"], rates=(0.5, 1.0))
    for rate in (0.5, 1.0):
        bias, prompted = (plan.compose(Trial(name, None, 0, rate))[0] for name in plan.methods)
        assert (bias.tuning.lr, prompted.optim.prompt_lr) == (4e-3 * rate, 4e-3 * rate)
    with pytest.raises(ConfigError, match=r"prompt\.num_tokens=3 has no effect"):
        plan_of("bias", "linear", words=[*DATA, "prompt.num_tokens=3"])


def test_runs_have_folders_and_titles_of_their_own(tmp_path):
    plan = plan_of("bias", words=[*DATA, "run.root=elsewhere"])
    for config in plan.place(Trial("bias", 5, 1, 0.3), tmp_path):
        assert (config.run.root, config.run.name, config.run.title) == (str(tmp_path), None, "bias_5shot_seed1_lr0.3")


def test_environment_variables_are_not_saved(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "key")
    plan = plan_of("bias", words=["dataset=folder", "dataset.root=${oc.env:SECRET}"])
    config, shown = plan.place(Trial("bias", None, 0, 1.0), tmp_path)
    assert (config.dataset.root, shown.dataset.root) == ("key", "${oc.env:SECRET}")


@pytest.mark.parametrize(
    ("words", "seeds", "rates", "shots"),
    [
        ([], (0, 1, 2), (1.0,), (None,)),
        (["seeds=2", "rates=3", "shots=5"], (0, 1), (3.0,), (5,)),
        (["seeds=[4,2]", "rates=3,0.3", "shots=[all,5,1]"], (4, 2), (0.3, 3.0), (1, 5, "all")),
    ],
)
def test_lists_are_typed_with_brackets_or_without(words, seeds, rates, shots):
    plan = read_options(["+experiment=quickstart", "methods=linear", *words]).plan
    assert (plan.seeds, plan.rates, plan.shots) == (seeds, rates, shots)


def outcome(rate=1.0, val=0.5, test=0.5, loss=1.0, seed=0, error=""):
    metrics = {"val": {"top1": val, "loss": loss}, "test": {"top1": test, "loss": loss}}
    result = {} if error else {"metrics": metrics, "seconds": 2.0, "best_epoch": 1, "epochs": 1, "steps": 3}
    return Outcome(Trial("bias", None, seed, rate), Path("runs/bias"), 1000, result, (val,), error)


def row_of(*outcomes, search=(), rate=1.0):
    cost = Cost({"head": 5, "adapter": 2}, 4, 8_000_000, None, 300, 200)
    return Row("bias", "bias", None, "top1", "test", cost, search or outcomes[:1], rate, outcomes, None)


def test_the_rate_is_selected_on_val_alone():
    search = [outcome(0.3, val=0.6, test=0.9), outcome(1.0, val=0.8, test=0.1), outcome(3.0, val=0.7, test=1.0)]
    assert _choose(search, "top1") == 1.0
    equal = [outcome(0.3, loss=1.0), outcome(1.0, loss=0.5), outcome(3.0, loss=0.5)]
    assert _choose(equal, "top1") == 1.0  # the lower of two equals
    assert _choose([outcome(0.3, error="nan"), outcome(3.0, loss=math.nan)], "top1") == 3.0
    assert _choose([outcome(0.3, error="nan"), outcome(3.0, error="nan")], "top1") is None


def test_a_rate_at_an_edge_of_the_search_is_marked():
    search = tuple(outcome(rate) for rate in (0.3, 1.0, 3.0))
    assert [row_of(search[1], search=search, rate=rate).is_at_edge for rate in (0.3, 1.0, 3.0)] == [True, False, True]
    assert not row_of(outcome()).is_at_edge


def test_failed_seeds_are_reported_and_do_not_count():
    row = row_of(outcome(test=0.4), outcome(test=0.6, seed=1), outcome(seed=2, error="nan; lower the learning rates"))
    columns = table_columns(row)
    assert (columns["mean"], columns["runs"], columns["failed"]) == (0.5, 2, "1 failed: nan")
    assert columns["std"] == pytest.approx(math.sqrt(0.02))
    assert (columns["trained"], columns["trained_adapter"], columns["trained_prompt"]) == (7, 2, 0)
    assert columns["inference_flops_vs_bare"] == 1.5
    text = describe_table([row])
    assert "50.0 % (40.0 to 60.0)" in text
    assert text.endswith("bias: 1 failed: nan")


def test_every_column_is_documented():
    page = (TEMPLATE.parents[2] / "docs" / "compare.md").read_text()
    named = page.replace("`_", "`trained_")
    columns = [name for name in table_columns(row_of(outcome())) if name != "trained_adapter"]
    assert [name for name in columns if f"`{name}`" not in named] == []


def test_a_spread_without_values_is_a_dash():
    assert str(Spread.of([])) == str(Spread.of([math.nan])) == "-"
    assert str(Spread.of([0.25])) == "25.0 %"
    assert Spread.of([0.25]).std is None


def test_a_table_has_the_columns_of_all_rows_and_no_formulas(tmp_path):
    _write_table(tmp_path / "a.csv", [{"a": -1}, {"a": None, "b": "=x,y"}])
    assert (tmp_path / "a.csv").read_text() == 'a,b\n-1,\n,"\'=x,y"\n'


def test_images_are_ordered_by_disagreement():
    targets = [0, 0, 0, 0, 0]
    # in turn: all agree; 2 to 1; all differ; 2 to 1, none right; all differ
    predictions = [[0, 1, 0, 2, 1], [0, 0, 1, 1, 2], [0, 0, 2, 1, 3]]
    assert disagreement([0, 1, 2]) == pytest.approx(math.log2(3))
    assert most_disputed(predictions, targets, 9) == [2, 4, 1, 3]
    assert most_disputed(predictions, targets, 1) == [2]
    assert most_disputed([[0, 0, 1, 1], [1, 1, 0, 0]], [0, 0, 1, 1], 4) == [0, 2, 1, 3]  # one of each class in turn


def test_no_text_ends_the_script_around_it():
    evil = {"classes": ["</script><script>alert(1)</script>", "<!--<script>"], "value": math.nan}
    html, plain = to_html(evil), TEMPLATE.read_text()
    for part in ("<script", "</script", "<!--"):
        assert html.count(part) == plain.count(part)
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert json.loads(text) == {**evil, "value": None}


def test_the_page_has_no_address_but_that_of_svg():
    addresses = re.findall(r"""(?:https?:)?//[\w.]+|src=["'][^"']+|@import|url\(""", TEMPLATE.read_text())
    assert {address for address in addresses if "w3.org" not in address and not address.startswith("// ")} == set()
