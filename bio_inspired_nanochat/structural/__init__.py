"""The economy and the life of experts: accounts, birth, split, merge and death, family trees and scores."""

from bio_inspired_nanochat.structural.lineage import LineageLog, NeuroPhylo, read_lineage
from bio_inspired_nanochat.structural.metabolism import Ledger, metabolise, update
from bio_inspired_nanochat.structural.neuroscore import (
    ForgettingCurve,
    NeuroBoard,
    NeuroScore,
    contribution_of,
    gini,
    leave_one_out,
    oracle_agreement,
    scores,
    scores_of,
    specialization,
    variation,
)
from bio_inspired_nanochat.structural.splitmerge import Event, Rules, decide, health
from bio_inspired_nanochat.structural.surgery import Moments, operate

__all__ = [
    "Event",
    "ForgettingCurve",
    "Ledger",
    "LineageLog",
    "Moments",
    "NeuroBoard",
    "NeuroPhylo",
    "NeuroScore",
    "Rules",
    "contribution_of",
    "decide",
    "gini",
    "health",
    "leave_one_out",
    "metabolise",
    "operate",
    "oracle_agreement",
    "read_lineage",
    "scores",
    "scores_of",
    "specialization",
    "update",
    "variation",
]
