"""Videos and annotations in, samples and frame indices out. No network, no torch model lives here.

``frames`` and its siblings decode; ``lvu``, ``msvd`` and ``clips`` read annotations into samples; ``sampling`` chooses
frames with pure integers; ``manifest`` counts what is wanted, found, decoded and missing.
"""
