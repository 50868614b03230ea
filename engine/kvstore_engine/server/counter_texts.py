"""What the counters of the engine process and of the connector mean, as /metrics tells it."""

COUNTER_TEXTS = {
    # The engine loop and its scheduler.
    "steps": "Steps of the engine that computed a batch",
    "step_seconds": "Time in steps that computed a batch: scheduling, model and bookkeeping",
    "schedule_seconds": "The part of step_seconds outside the model",
    "computed_tokens": "Tokens that the model computed: what no cache had of prompts, and output",
    "preemptions": "Running requests that gave their KV pages to others, to go on later",
    "loads_overdue": "Loads given up after load-timeout-s; their prompts are computed",
    "loads_short": "Loads that brought fewer blocks than the look-up promised",
    "load_results_unexpected": "Results of loads that the connector gave twice, or without a load",
    "save_blocks_skipped": "Blocks not handed to the connector: too many waited, or their page "
    "was reused first",
    # The connector to the store.
    "connector_sessions": "Sessions that were opened with the node",
    "connector_sessions_lost": "Sessions that ended from the node's side",
    "connector_stalls": "Probes that a stalled node left unanswered; it is not used until it "
    "answers one",
    "connector_directory_lookups": "Look-ups in the node's directory; without a call to the node",
    "connector_loads": "Loads of blocks from the store that were started",
    "connector_loads_short": "Loads from the store that ended before their last block",
    "connector_loaded_blocks": "Blocks that were copied from the store into KV pages",
    "connector_loaded_bytes": "Bytes that were copied from the store into KV pages",
    "connector_load_copy_seconds": "Time of copying from the store's memory into KV pages",
    "connector_saved_blocks": "Blocks that this engine stored",
    "connector_saved_bytes": "Bytes that this engine stored",
    "connector_save_cpu_seconds": "CPU time of copying from KV pages into the store's memory",
    "connector_saves_held_blocks": "Computed blocks that the store had already; not copied",
    "connector_saves_skipped_unavailable_blocks": "Computed blocks that were not stored because "
    "no node was there",
    "connector_saves_dropped_blocks": "Computed blocks that were not stored because more than "
    "save_queue_bytes waited",
    "connector_saves_failed_blocks": "Computed blocks that the store did not take: no space, "
    "too late, or an error",
}
OTHER_TEXT = "A counter of the KV connector; its own documentation says more"
