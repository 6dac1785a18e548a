import pytest

from megatron_r1reward.monitor.metrics import METRICS, check_metrics


def test_known_names_pass_and_values_become_floats() -> None:
    checked = check_metrics({"loss": 1, "reward/mean": 0.5})
    assert checked == {"loss": 1.0, "reward/mean": 0.5}
    assert all(type(value) is float for value in checked.values())


def test_unknown_name_is_refused_with_the_closest_one() -> None:
    with pytest.raises(ValueError, match=r"'reward/men'.*did you mean 'reward/mean'"):
        check_metrics({"reward/men": 0.5})
    with pytest.raises(ValueError, match="add it to the table"):
        check_metrics({"zzz": 0.5})


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'loss'.*log one number"):
        check_metrics({"loss": [1.0, 2.0]})  # type: ignore[dict-item]


def test_every_metric_says_what_it_is() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.unit
        assert metric.description
        assert metric.better in {"higher", "lower", "neither"}
