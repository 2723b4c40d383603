"""How the numbers are made: three stages that meet only in the cache on disk and in ``pipeline``.

::

    video ──> data.frames ──┬─> extract.clip ──> tokens        [n, P, C]   ┐
                            └─> extract.dit  ──> pooled/layer8 [n, D]      ┴─> cache (cache_schema)
    cache ──> data.samples ──> train.student ──> prefix [B, Q, V] ──> decode.llm ──> L_ce      (Eq. 8)
                                     └─ hidden {u: [B, T, Q, E]} ──> train.alignment ──> L_kd   (Eq. 4–7)
    L = L_ce + lambda_kd · L_kd                                                                 (Eq. 9)
    checkpoint ──> decode.evaluate ──> beam 5 ──> answer ──> top-1 with its interval

Notation. The paper reuses P, H, N and t; here each letter has one meaning.

=======  ==================================================================
letter   meaning (value in the paper)
=======  ==================================================================
B        batch
T        frames of a window (100)
P        CLIP tokens per frame, class token first (257)
C        CLIP width (1408)
Q        query tokens (32)
L        text tokens in the Q-Former
N        tokens of one bank entry: P (visual) or Q + L (query bank)
E        Q-Former width (768)
D        teacher width (1152)
M        number of aligned levels (6)
K        memory length (20)
V        width of the language model (4096)
f_t      frame features + PE(t)                                      (Eq. 1)
h_t      query output at step t
z        projected h
y_star   pooled teacher target
t, tau   frame step; diffusion time
u        level, 1-based: level u is ``hidden_states[u - 1]`` (13 entries)
window   a piece of a video; ``clip`` is always the encoder
=======  ==================================================================

Layers are 1-based as in the paper: DiT layer 8 is ``transformer_blocks[7]``.
"""
