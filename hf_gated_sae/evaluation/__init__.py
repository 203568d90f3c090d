"""Evaluating SAEs: one file per evaluator, each with a frozen report that can be written as plain JSON."""

from .concepts import ConceptScore, ConceptScores
from .fidelity import evaluate
from .report import FidelityReport

__all__ = ["ConceptScore", "ConceptScores", "FidelityReport", "evaluate"]
