"""What each choice of RMSD does, one at a time, from RMSD with the context judge and anchors as in the comparison.
`of` names another method to start from; `max_drift`, a drift after which an exam ends the run."""

ABLATED, RIVAL, STEPS, LEARNING_RATE = "rmsd_context_anchors", "opsd_anchors", 100, 3e-4

JSD, AVERAGE = dict(divergence="jsd"), dict(teacher="ema", ema_decay=0.95)
# SGD's rates: at 0.5 its first steps are about as long as AdamW's, and skills are lost.
SGD = [dict(optim="sgd", learning_rate=rate) for rate in (0.05, 0.15, 0.5)]
LARGER = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6)  # four times as many
# As the comparison continues, on hinted rows, where continued runs forget most.
CONTINUED = dict(of="rmsd_context", steps=150, every=10, continuation=100)
SHORT = dict(max_completion_length=12)  # of 32: the name once, and no closing

GROUPS = {
    "T and S": {
        "T 20, S 5": {},
        "T 20, S 1": dict(num_kept=1),
        "T 20, S 20": dict(num_kept=20),
        "T 5, S 5": dict(num_candidates=5),
        "T 2, S 2": dict(num_candidates=2, num_kept=2),
    },
    "criterion": {
        "log-probability gap": {},
        "divergence": dict(criterion="divergence"),
        "entropy gap": dict(criterion="entropy_gap"),
        "entropy rise": dict(criterion="entropy_rise"),
        "entropy fall": dict(criterion="entropy_fall"),
        "supported": dict(criterion="supported"),
        "TIP": dict(criterion="tip"),
    },
    "weights": {
        "none": {},
        "gap weight 5": dict(gap_weight=5.0),
        "forward KL above 0.5 nats": dict(forward_kl_above=0.5),
        "guided, 1 in 4": dict(guided_rollouts=0.25),
    },
    "threshold": {"0 nats": {}, "0.5 nats": dict(threshold=0.5), "2 nats": dict(threshold=2.0)},
    "divergence": {"reverse KL": {}, "forward KL": dict(divergence="forward_kl"), "JSD": JSD},
    "vocabulary top-k": {
        "K 64, bucket": {},
        "all": dict(vocab_topk=None),
        "K 20, drop": dict(vocab_topk=20, tail="drop"),
        "K 3, drop": dict(vocab_topk=3, tail="drop"),
        "K 3, bucket": dict(vocab_topk=3, tail="bucket"),
        "K 3, renorm": dict(vocab_topk=3, tail="renorm"),
    },
    "judge": {
        "context": {},
        "magnitude": dict(judge="magnitude"),
        "contrast": dict(judge="contrast"),
        "contrast, floor 1.5 nats": dict(judge="contrast", floor=1.5),
        "oracle": dict(judge="oracle"),
        "oracle, misses 1 in 2": dict(judge="oracle", degrade=[0.5, 0.0]),
        "oracle, misses 4 in 5": dict(judge="oracle", degrade=[0.8, 0.0]),
        "oracle, keeps 1 in 10 others": dict(judge="oracle", degrade=[0.0, 0.1]),
        "oracle, keeps 1 in 2 others": dict(judge="oracle", degrade=[0.0, 0.5]),
    },
    "directions": {
        "both": {},
        "promotions only": dict(judge="promotions"),
        "both, hinted rows": dict(of="rmsd_context"),
        "promotions only, hinted rows": dict(of="rmsd_context", judge="promotions"),
    },
    "contrast, hinted rows": {
        "floor 0.5 nats": dict(of="rmsd_contrast"),
        "floor 1.5 nats": dict(of="rmsd_contrast", floor=1.5),
        "floor 2.5 nats": dict(of="rmsd_contrast", floor=2.5),
        "on topic": dict(of="rmsd_contrast_topic"),
    },
    "teacher": {"initial": {}, "live": dict(teacher="live"), "moving average, 0.95": AVERAGE},
    "holding": {
        "unkept KL 0": CONTINUED,
        "unkept KL 0.1": dict(CONTINUED, unkept_kl=0.1),
        "stopped above drift 0.3": dict(CONTINUED, max_drift=0.3),
    },
    "rollout length": {
        "RMSD, 32 tokens": {},
        "OPSD, 32 tokens": dict(of=RIVAL),
        "RMSD, 12 tokens": SHORT,
        "OPSD, 12 tokens": dict(of=RIVAL, **SHORT),
    },
    "optimizer": {
        "RMSD, AdamW": {},
        "OPSD, AdamW": dict(of=RIVAL),
        "RMSD, SGD 0.05": SGD[0],
        "OPSD, SGD 0.05": dict(of=RIVAL, **SGD[0]),
        "RMSD, SGD 0.15": SGD[1],
        "OPSD, SGD 0.15": dict(of=RIVAL, **SGD[1]),
        "RMSD, SGD 0.5": SGD[2],
        "OPSD, SGD 0.5": dict(of=RIVAL, **SGD[2]),
    },
    "model size": {
        "RMSD, 0.4 million": {},
        "OPSD, 0.4 million": dict(of=RIVAL),
        "RMSD, 1.8 million": dict(pretraining=LARGER),
        "OPSD, 1.8 million": dict(of=RIVAL, pretraining=LARGER),
    },
    "beside OPSD": {
        "RMSD, JSD": JSD,
        "OPSD, JSD": dict(of=RIVAL, **JSD),
        "RMSD, moving average": AVERAGE,
        "OPSD, moving average": dict(of=RIVAL, **AVERAGE),
        "RMSD, both": {**JSD, **AVERAGE},
        "OPSD, both": dict(of=RIVAL, **JSD, **AVERAGE),
    },
}
