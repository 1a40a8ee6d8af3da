"""Errors: one tree, one table, stable codes, sentences that say what to do."""

from __future__ import annotations

from api.errors import STATUS, status_of
from shared import errors
from shared.metrics import JOB_ERRORS, REJECTIONS


def every(kind: type[errors.ServiceError] = errors.ServiceError) -> list[type[errors.ServiceError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in every(child))]


def make(kind: type[errors.ServiceError]) -> errors.ServiceError:
    if kind is errors.InvalidField:
        return errors.InvalidField([("field", "is wrong")])
    if kind is errors.JobFailed:
        return errors.JobFailed("code", "message")
    return kind()


def test_every_error_has_a_sentence_and_a_code():
    for kind in every():
        error = make(kind)
        assert error.message
        assert "\n" not in error.message
        assert error.code.replace("_", "").isalpha()


def test_the_table_gives_the_status_of_the_nearest_class():
    assert status_of(errors.FileTooLarge()) == 413
    assert status_of(errors.StorageFull()) == 507
    assert status_of(errors.RequestError()) == 400
    assert status_of(errors.ServiceError()) == 500
    kinds = list(STATUS)
    for place, kind in enumerate(kinds):
        assert not any(issubclass(kind, earlier) for earlier in kinds[:place]), kind


def test_the_metrics_know_every_code_that_a_job_can_fail_with():
    bases = (errors.MediaError, errors.TranscriptionError)
    codes = {kind.code for base in bases for kind in every(base)}
    assert codes == set(JOB_ERRORS)


def test_every_refusal_of_an_upload_has_a_reason():
    assert set(REJECTIONS) <= {kind.code for kind in every()}
