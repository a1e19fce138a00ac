"""The edge's model: how its graphs are made, how they run, and the KV they leave.

What every turn uses:
  runtime, runner            a built model: prefill with KV out, short decode (start here)
  chunks                     how a prompt is cut into runs (pure)
  kv, prefix_cache           the KV buffer of one conversation; KV blocks by id
  providers, tensorrt        which device runs the graphs

`segue model build`, once per model:
  export, builder            the steps, and the graph from the builder's package
  graph, float_graph, exact  a graph in memory; in float32; the exact model to compare with
  smooth, quantise           outliers into the weights; INT8
  last_layer, head           the last layer for one position; the output layer as a graph of its own
  quality, gate, ladder      what is measured, and which KV codecs pass
  sensitivity                which matrices stay exact
  qdq                        `segue model tensorrt`: a graph with constant scales
"""
