"""Metrics, traces, logs, and the standard streams that logs are written to.

Every metric is declared in `metrics`. `tracing` is the only module that imports OpenTelemetry.
"""
