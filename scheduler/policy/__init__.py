"""The policy core decides everything and touches nothing: facts and the time go in, decisions come out.

No socket, database, thread, clock or randomness: the service, the simulator and the property tests run this
same code. Read `board` first; it is told facts by `apply` and answers with `decide`.
"""
