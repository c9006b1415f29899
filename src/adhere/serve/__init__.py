"""The reward over HTTP: `batcher` brings requests together for the model, `wire` says what they hold, `app` answers."""
