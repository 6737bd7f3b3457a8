"""Helpers for tests of methods, drafters, evaluators and families, those of other packages included.

    from lvlm_decode.testing import check_method

    def test_my_method():
        check_method(MyMethod(alpha=1.0))

``check_method``, ``check_family``, ``check_drafter`` and ``check_evaluator`` hold a thing to the rules that this library's own
tests hold its own to, and raise one ``AssertionError`` that names the broken ones. ``method_checks`` and its like give the rules
one by one, for ``pytest.mark.parametrize("check", method_checks(MyMethod()), ids=str)``. Nothing here needs pytest; with it,
``pytest.register_assert_rewrite("lvlm_decode.testing")`` in ``conftest.py`` makes it print more about a failure.
"""

from .contract import check_method, method_checks
from .drafters import check_drafter, drafter_checks
from .evaluators import check_evaluator, evaluator_checks
from .families import check_family, family_checks

__all__ = [
    "check_drafter",
    "check_evaluator",
    "check_family",
    "check_method",
    "drafter_checks",
    "evaluator_checks",
    "family_checks",
    "method_checks",
]
