"""What must hold of every call, on random ones; long runs by hand: ``benchmarks/properties``."""

import pytest
from hypothesis import HealthCheck, given, settings
from properties import cases, hold

QUIET = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=15, **QUIET)
@given(cases())
def test_a_few_random_calls(case):
    hold(case)


@pytest.mark.full
@settings(max_examples=150, **QUIET)
@given(cases())
def test_many_random_calls(case):
    hold(case)
