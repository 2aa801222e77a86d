"""Closed-form compensation: what reads the removed channels is fitted again, without gradients."""

from .compensate import Compensated, Compensation, FittedReader, compensate

__all__ = ["Compensated", "Compensation", "FittedReader", "compensate"]
