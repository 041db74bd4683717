"""What every role shares: configuration, messages, transport, errors, logs and metrics. Imports no role."""
