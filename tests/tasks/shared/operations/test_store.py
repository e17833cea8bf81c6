"""A store of another version of MLflow is one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy
from mlflow.store.db.utils import _verify_schema

from deepclust.errors import TrackingError
from tasks.shared.operations import store


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ("451aebb31d03", r"got an older one \(451aebb31d03\); back it up, .*: mlflow db upgrade http://\*\*\*@mlflow$"),
        ("ffffffffffff", r"got a newer one \(ffffffffffff\); use the MLflow that wrote it, or another store: MLFLOW_"),
    ],
)
def test_a_schema_that_does_not_fit_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: str, expected: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow")
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/mlflow.db")
    with engine.begin() as database:
        database.execute(sqlalchemy.text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        database.execute(sqlalchemy.text(f"INSERT INTO alembic_version VALUES ('{schema}')"))
    with pytest.raises(TrackingError, match=expected), store.errors():
        _verify_schema(engine)
