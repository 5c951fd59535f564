"""The way from tar shards to padded micro-batches.

- `stored`: shards, their index, and the utterances in them;
- `plan`: which utterances make up which micro-batch of which step;
- `examples`: from a stored utterance to token ids and audio, and from examples to a micro-batch;
- `training_set`: index and plan of a training set together;
- `loader`: the micro-batches of one rank;
- `token_view`: one utterance token by token, for `shards show --tokens`.

Nothing here uses process groups: rank and world size are integers.
"""
