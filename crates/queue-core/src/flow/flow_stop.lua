-- Stops an execution of a flow: steps that run come to their ends, and no other is begun.
-- ARGV: id
-- Reply: {'stopped'}, {'stopping'} (some run), {'over', status}, or {'missing'}
return stop_flow(ARGV[1], false)
