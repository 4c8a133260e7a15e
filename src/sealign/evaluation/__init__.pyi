from .answer_classifier import Classifier as Classifier
from .answer_classifier import load_classifier as load_classifier
from .answer_measures import AnswerMeasure as AnswerMeasure
from .answer_measures import ArmAnswer as ArmAnswer
from .answer_measures import Scorer as Scorer
from .answer_measures import load_scorer as load_scorer
from .answers import Answers as Answers
from .answers import compare_answers as compare_answers
from .choices import ChoiceRequest as ChoiceRequest
from .choices import ChoiceScore as ChoiceScore
from .comparison import Comparison as Comparison
from .comparison import EditReport as EditReport
from .comparison import compare_results as compare_results
from .comparison import report_edits as report_edits
from .cost import Cost as Cost
from .cost import measure_cost as measure_cost
from .damage import Damage as Damage
from .damage import measure_damage as measure_damage
from .damage import measure_damages as measure_damages
from .damage import measure_passages as measure_passages
from .engines import Engine as Engine
from .engines import served_engine as served_engine
from .evaluate_edits import evaluate as evaluate
from .evaluation_config import EvaluationConfig as EvaluationConfig
from .finalists import Finalist as Finalist
from .harness import SealignLM as SealignLM
from .judge import EndpointJudge as EndpointJudge
from .judge import Judge as Judge
from .judge import LocalJudge as LocalJudge
from .local_tasks import LOCAL_TASKS as LOCAL_TASKS
from .local_tasks import task_manager as task_manager
from .preference import preference_scores as preference_scores
from .results import Results as Results
from .scan import ScannedCandidate as ScannedCandidate
from .scan import scan as scan
from .scoring import ContinuationScores as ContinuationScores
from .scoring import score_choices as score_choices
from .scoring import score_continuations as score_continuations
from .served_model import ServedModel as ServedModel
from .statistics import Difference as Difference
from .statistics import holm as holm
from .statistics import paired_difference as paired_difference
from .statistics import ratio_difference as ratio_difference
from .strength_choice import DamageBudget as DamageBudget
from .strength_choice import DamageTexts as DamageTexts
from .strength_choice import StrengthChoice as StrengthChoice
from .strength_choice import choose_strength as choose_strength
from .tuning import TuneResult as TuneResult
from .tuning import tune as tune
from .tuning_config import TuneConfig as TuneConfig
from .verdict import Effect as Effect
from .verdict import Verdict as Verdict
from .verdict import judge_effects as judge_effects

__all__ = [
    "LOCAL_TASKS",
    "AnswerMeasure",
    "Answers",
    "ArmAnswer",
    "ChoiceRequest",
    "ChoiceScore",
    "Classifier",
    "Comparison",
    "ContinuationScores",
    "Cost",
    "Damage",
    "DamageBudget",
    "DamageTexts",
    "Difference",
    "EditReport",
    "Effect",
    "EndpointJudge",
    "Engine",
    "EvaluationConfig",
    "Finalist",
    "Judge",
    "LocalJudge",
    "Results",
    "ScannedCandidate",
    "Scorer",
    "SealignLM",
    "ServedModel",
    "StrengthChoice",
    "TuneConfig",
    "TuneResult",
    "Verdict",
    "choose_strength",
    "compare_answers",
    "compare_results",
    "evaluate",
    "holm",
    "judge_effects",
    "load_classifier",
    "load_scorer",
    "measure_cost",
    "measure_damage",
    "measure_damages",
    "measure_passages",
    "paired_difference",
    "preference_scores",
    "ratio_difference",
    "report_edits",
    "scan",
    "score_choices",
    "score_continuations",
    "served_engine",
    "task_manager",
    "tune",
]
