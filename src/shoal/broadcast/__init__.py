"""A model's published versions, carried to every node: chain, delta codec, store, writer, fetcher.

    learner: tensors ─▶ SnapshotWriter ─▶ store ─▶ Publisher ══ fabric ══▶ Fetcher ─▶ store ─▶ Image ─▶ tensors :engine
                        (what changed)                                                        (the change applied)

Invariant of the room: a node is never handed bytes whose hash is not on the signed chain. The signature covers the
manifest, the manifest names every chunk's and every tensor's hash; manifests are checked where they enter
(`chain.open_manifest`), chunks before they are stored and again when they are read, tensors before they are handed
out, and a snapshot is handed out whole or not at all. So no relay, disk or network need be trusted.

A version is published as what changed since its parent (`delta`), now and then whole as well (an anchor), for those
who hold nothing. Tensors are plain buffers (`tensors.TensorView`): this room knows no torch.
"""
