"""The engine on a CUDA card.

    runner            the plain runner with the parts below; steps that only decode are replayed
    decode_graph      which steps, static buffers, padding rows, capture and replay
    attention         attention over pages: torch with a gather, for every dtype and window
    flashinfer        the same by FlashInfer's kernels, where that is installed (segue[cloud-gpu])
    ops               what lies between the matrix products, with one upload a step
    pages, transfers  KV pages whose blocks go to and from the host through pinned memory
    host_tier         evicted blocks, coded by a thread of its own while the card computes
    memory            how many pages a card holds

Everything but `flashinfer`, and the two classes that speak to the card (`CudaCapture`,
`CudaTransfers`), also runs on a CPU: there the tests hold it against the plain engine.
"""
