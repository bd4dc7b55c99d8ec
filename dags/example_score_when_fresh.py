"""An example of a DAG that uses features: it waits until two feature views are fresh online, then reads them and scores payments."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param, get_current_context, task

from materialize.airflow.sensors import FreshnessSensor
from materialize.airflow.tasks import config_dir, connection, utcnow
from materialize.config import load

DOC = """\
Trigger it with the entity keys of some payments. It waits until `user_spending_stats` and `merchant_risk` are fresh in the store
`default`, and then prints a score for each payment: a weighted sum of features of its user and its merchant.

To score each time when features change instead, give the DAG `schedule=[asset("merchant_risk", "default")]`
(`materialize.airflow.tasks.asset`), and keep the sensors for the views that the schedule does not name.
"""
#: What a feature counts for; a feature that is null or whose entity is not online counts 0.
WEIGHTS = {
    "user_spending_stats": {"total_spend_7d": 0.001, "transaction_count_30d": -0.01},
    "merchant_risk": {"risk_score": 2.0, "chargeback_rate_90d": 5.0},
}
PAYMENTS = [
    {"user_id": "1", "merchant_id": "1", "country": "DE"},
    {"user_id": "2", "merchant_id": "1", "country": "FR"},
]


def score(payments: list[dict[str, str]]) -> list[float]:
    """The score of each payment, out of the features that are online now."""
    from materialize.entity_key import format_key
    from materialize.online import open_store
    from materialize.serving import FeatureReader

    config = load(config_dir(Path(__file__).parent), connections=connection)
    scores = [0.0] * len(payments)
    with open_store(config.online_store("default")) as online:
        for name, weights in WEIGHTS.items():
            view = config.feature_view(name)
            keys = [format_key([payment[key] for key in view.join_keys]) for payment in payments]
            vectors = FeatureReader(view, online).lookup(keys, now=utcnow(), features=list(weights))
            for row, vector in enumerate(vectors):
                scores[row] += sum(weights[feature] * (value or 0) for feature, value in vector.features.items())
    return scores


with DAG(
    "example_score_when_fresh",
    description="Example: wait for fresh features, then score payments",
    doc_md=DOC,
    schedule=None,
    catchup=False,
    is_paused_upon_creation=True,
    params={"payments": Param(PAYMENTS, type="array", title="Payments", description="Entity keys, as text.")},
    tags=["example"],
) as dag:

    @task(task_id="score")
    def score_payments() -> list[float]:
        payments: Any = get_current_context()["params"]["payments"]
        scores = score(payments)
        for payment, points in zip(payments, scores, strict=True):
            print(f"{payment}: {points:.3f}")  # noqa: T201 - what a task prints is in its log
        return scores

    fresh = [
        FreshnessSensor(task_id=f"{view}_is_fresh", view=view, within=timedelta(hours=2), timeout=timedelta(hours=1))
        for view in WEIGHTS
    ]
    fresh >> score_payments()
