"""What a turn computes on this node; the thread that does it is `segue_edge.compute`.

edge_part    one prefill and the tokens that follow from it
prefill_job  the jobs: a prefill chunk by chunk with its blocks, one decoded token
decoder      token after token, with text and stop strings
warm         idle time: prefill what the next message will begin with
model_port   what all this needs of the model's runtime
tools        the node's model, caches and estimates, the same for all turns
"""
