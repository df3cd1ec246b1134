"""The layouts that training is tested under: processes, and what changes in the recipe."""

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ETP2 = {"expert_tensor_parallel_size": 2}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

DENSE = {
    "TP2": (2, {"parallel": TP2}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "PP2": (2, {"parallel": PP2}),
    "PP2xVPP2": (2, {"parallel": PP2 | {"virtual_pipeline_model_parallel_size": 2}}),
    "CP2": (2, {"parallel": CP2}),
    "DP2": (2, {}),
    "DP2, optimizer not distributed": (2, {"parallel": {"distributed_optimizer": False}}),
    "DP2, reduction overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "distributed_optimizer": False}}),
    "TP2xPP2": (4, {"parallel": TP2 | PP2}),
    "TP2xCP2": (4, {"parallel": TP2 | CP2}),
    "TP2+SPxCP2": (4, {"parallel": TP2 | SP | CP2}),
    "CP2xDP2, packed": (4, {"parallel": CP2, "data": {"packing": True}}),
    "TP2+SPxPP2xCP2": (8, {"parallel": TP2 | SP | PP2 | CP2}),
    "TP2xPP2xVPP2xDP2, packed": (
        8,
        {"parallel": TP2 | PP2 | {"virtual_pipeline_model_parallel_size": 2}, "data": {"packing": True}},
    ),
    "micro batch 2": (1, {"train": {"micro_batch_size": 2}}),
    "packed": (1, {"data": {"packing": True}}),
    "TP2+SP, packed": (2, {"parallel": TP2 | SP, "data": {"packing": True}}),
    "recompute": (1, {"parallel": RECOMPUTE}),
    "recompute, selective": (1, {"parallel": {"recompute_granularity": "selective"}}),
    "TP2+SPxCP2, recompute": (4, {"parallel": TP2 | SP | CP2 | RECOMPUTE}),
    "teacher offloaded": (1, {"teacher": {"offload_teacher_model": True}}),
    "TP2xPP2, teacher offloaded": (4, {"parallel": TP2 | PP2, "teacher": {"offload_teacher_model": True}}),
}
MOE = {
    "EP2": (2, {"parallel": EP2}),
    "DP2": (2, {}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "TP2+SPxETP2": (2, {"parallel": TP2 | SP | ETP2}),
    "TP2+SPxETP2xEP2": (4, {"parallel": TP2 | SP | ETP2 | EP2}),
    "TP2+SPxEP2": (2, {"parallel": TP2 | SP | EP2}),
    "TP2+SPxEP2xDP2": (4, {"parallel": TP2 | SP | EP2}),
    "PP2xEP2": (4, {"parallel": PP2 | EP2}),
    "CP2xEP2": (2, {"parallel": CP2 | EP2}),
}
