"""A model's published versions, carried to every node: chain, store, publisher, fetcher.

    learner: tensors ─▶ write_snapshot ─▶ store ─▶ Publisher ══ fabric ══▶ Fetcher ─▶ store ─▶ tensors :engine

Invariant of the room: a node is never handed bytes whose hash is not on the signed chain. The signature covers the
manifest, the manifest names every chunk's and every tensor's hash; manifests are checked where they enter
(`chain.open_manifest`), chunks before they are stored and again when they are read, tensors before they are handed
out, and a snapshot is handed out whole or not at all. So no relay, disk or network need be trusted.

Snapshots are whole here. Tensors are plain buffers (`tensors.TensorView`): this room knows no torch.
"""
