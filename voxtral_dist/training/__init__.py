"""The parts of a training run, in the order in which `voxtral_dist.train` uses them.

- `run_checks`: one folder for all ranks, no other run in it, and the same data on all ranks;
- `signals` and `time_limit`: requests to stop;
- `metrics_log`: rows in `metrics.jsonl`, scalars for `tensorboard`, and the live `display`;
- `step`: one update over all ranks, and its `step_metrics`; `not_finite`: the end of a run that diverged;
- `saver`: checkpoints, in the background where memory allows;
- `bad_utterances`: limits on unusable utterances;
- `evaluator`: the periodic evaluation of test sets;
- `checkpoint_selector`: the best checkpoint, by the rules in `selection`;
- `summary`: `summary.json` at the end.
"""
