"""What reliability after one look is fitted to."""

import pytest
import torch

from modeling_dms.calibrate.fit_reliability import _fit_one_look, _told
from modeling_dms.calibrate.records import FOLDS
from modeling_dms.calibrate.statistics import Reliability
from modeling_dms.weigh.reliability import reliability_numbers


def drawn(count=400):
    """How sure answers are, p-values of two sources and their pair, and of each answer its luck."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, *shape, generator=generator) for shape in ((), (3,), ())]


def fitted(sureness, p_values, agrees):
    reliability = Reliability(2)
    reliability.rate.fill_(0.1)
    numbers = reliability_numbers(sureness, p_values, 0.1)
    return reliability, _fit_one_look(reliability, numbers, agrees.float(), torch.arange(len(agrees)) % FOLDS)


def test_alarms_that_tell_nothing_have_no_say():
    """Else they would blur what the certainty tells: answers are ordered as by that alone."""
    sureness, p_values, luck = drawn()
    reliability, found = fitted(sureness, p_values, luck < sureness)
    assert reliability.coefficients[0] > 0
    assert (reliability.coefficients[1:-1] == 0).all()
    assert torch.equal(reliability(sureness, p_values).argsort(), sureness.argsort())
    # by fits that an answer took no part in
    assert (found - reliability(sureness, p_values)).abs().max() > 1e-4


def test_alarms_that_tell_more_count():
    sureness, p_values, luck = drawn()
    agrees = (luck < sureness) & (p_values[:, 0] > 0.1)
    reliability, found = fitted(sureness, p_values, agrees)
    assert _told(found, agrees) > _told(sureness, agrees) + 0.03
    flagged = torch.tensor([[0.01, 0.5, 0.5]]).expand(400, -1)
    fine = torch.tensor([[0.5, 0.5, 0.5]]).expand(400, -1)
    sure = sureness > 0.5
    assert (reliability(sureness, flagged) < reliability(sureness, fine) - 0.2)[sure].all()


@pytest.mark.parametrize("agree", [0.0, 1.0])
def test_answers_that_are_all_alike(agree):
    sureness, p_values, _ = drawn()
    reliability, _ = fitted(sureness, p_values, torch.full((400,), agree))
    assert ((reliability(sureness, p_values) - agree).abs() < 0.05).all()
