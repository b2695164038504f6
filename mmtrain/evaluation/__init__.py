"""Metrics over validation and test sets."""

from mmtrain.evaluation.evaluator import Evaluator, build_evaluator

__all__ = ["Evaluator", "build_evaluator"]
