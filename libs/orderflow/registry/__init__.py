"""Schema Registry: a local server and a client for the Confluent REST interface, and the rule by which schemas evolve.

Nothing is imported here, so that a service that only needs the client does not load the server.
"""
