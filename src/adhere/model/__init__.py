"""What runs a network: loading, sampling, replaying and reading attention. The only package that knows
decoder-only models from encoder–decoders."""
