"""What both HTTP servers, the service and the reward server, put between their apps and whoever connects.

Nothing that a client sends, holds back or leaves unread may grow the memory of a server, take the descriptors that it needs
for its own work, or keep `/healthz` from an answer.
"""
