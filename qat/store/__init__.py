"""Named archives: checkpoints, caches and runs that are kept somewhere else than in `outputs/`.

    names.py      which names there are, and what file or folder of a store holds one
    places.py     a store as a folder of files: a mounted Drive, a bucket, a hub repository
    archives.py   packing, and unpacking as if every archive were hostile
    transfer.py   pull, push and mirror: checksums, retries, verify, then rename

Nothing here imports torch, and nothing here reads a checkpoint: it only moves files.
"""
