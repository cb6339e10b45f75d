"""Weights from episodes: one optimizer step at a time.

A step reads top to bottom in `trainer.Trainer.step`: rewards become advantages (`advantages`), episodes become
trajectories of tokens (`batch`) that are packed into micro-batches in which a group's prompt is computed once
(`packing`, `attention`), the model gives the log-probabilities of the tokens drawn (`forward`, `head`), the loss
compares them with those they were sampled with (`losses`), and AdamW moves fp32 master weights (`optimizer`).
`checkpoint` keeps what a killed run resumes from; `loading` and `lora` prepare the model.

Torch is imported here and in `engine` only. Nothing in this room owns a socket or a task: whoever drives it
fetches batches and publishes `Trainer.tensors()`.
"""
