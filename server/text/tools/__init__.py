"""Calls of tools in a reply: found while its text streams in, and forced where a request asks for one. One file a family's format.

Every parser is a generator over the text (`scanning`), so that it reads as if all text were there: however a reply is cut into tokens, the same parts
come out. Nothing is lost: what begins like a call and is none becomes text again.
"""
