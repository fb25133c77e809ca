"""Named archives: checkpoints, caches and runs that are kept somewhere else than in `outputs/`.

    names.py      what a store calls things, and where they lie once they are pulled
    places.py     a store as a folder of files: a mounted Drive, a bucket, a hub repository
    archives.py   packing, and unpacking as if every archive were hostile

Pulling and pushing is `qat.transfer`. Nothing here imports torch or reads a checkpoint.
"""
