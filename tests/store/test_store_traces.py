"""The traces and the simulation behind ``python -m benchmarks admission``."""

import pytest
from kvstore.core.admission import ADMISSIONS

from benchmarks.admission import Simulation, synthetic_prompts, trace_prompts


def test_the_trace_is_the_published_one() -> None:
    prompts = trace_prompts()
    assert len(prompts) == 12_031
    assert sum(map(len, prompts)) == 288_500
    assert len({key for keys in prompts for key in keys}) == 182_790


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_a_simulated_node_finds_what_it_holds(admission: str) -> None:
    prompts = list(synthetic_prompts(200))
    outcome = Simulation(admission, 10_000).run(prompts)
    assert outcome.asked == sum(map(len, prompts))
    stored = outcome.asked - outcome.hits
    assert outcome.hits > 0
    assert outcome.written == stored if admission != "second-use" else outcome.written < stored
    assert Simulation(admission, 10_000).run(prompts) == outcome
