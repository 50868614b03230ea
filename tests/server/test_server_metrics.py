"""What /metrics says about the counters of the engine process."""

import re
from pathlib import Path

import kvstore_connector
from kvstore_engine.build import build_engine
from kvstore_engine.config import EngineConfig
from kvstore_engine.messages import EngineStats
from kvstore_engine.server.counter_texts import COUNTER_TEXTS, OTHER_TEXT
from kvstore_engine.server.metrics import COUNTED_HERE, Metrics


def connector_counters() -> set[str]:
    """The counters that the connector's source raises."""
    folder = Path(kvstore_connector.__file__).parent
    text = "\n".join(path.read_text() for path in folder.glob("*.py"))
    return set(re.findall(r'_counters\.add\(\s*"(\w+)"', text))


def test_every_counter_of_engine_and_connector_has_a_help_text_of_its_own() -> None:
    config = EngineConfig(model="tiny-random", num_pages=8, torch_threads=1)
    engine = build_engine(config).stats().counters.keys() - COUNTED_HERE
    connector = connector_counters()
    assert len(connector) > 10
    assert COUNTER_TEXTS.keys() == engine | connector
    assert len(set(COUNTER_TEXTS.values())) == len(COUNTER_TEXTS)


def test_help_texts_are_shown_and_other_connectors_counters_too() -> None:
    counters = {"preemptions": 3.0, "their_counter": 1.0}
    text = Metrics(lambda: EngineStats(0, 0, 0, 0, 0, counters, {})).render().decode()
    assert f"# HELP kvstore_engine_preemptions_total {COUNTER_TEXTS['preemptions']}\n" in text
    assert f"# HELP kvstore_engine_their_counter_total {OTHER_TEXT}\n" in text
