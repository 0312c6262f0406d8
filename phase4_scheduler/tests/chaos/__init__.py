"""Failures of servers in production, by the project's numbers, each with the tests that catch it.

"server/x" is ../server/test_x.py, "../x" is ../test_x.py, what has neither is here.

    F1   a client is gone and its request runs on   server/limits (each moment, shape and way to leave), storm
    F2   aborts lose blocks                         ../scheduler (stateful), storm, limits (F9)
    F3   healthy while it hangs                     processes, ../supervisor (SIGSTOP, a step without end)
    F4   orphans after kill -9                      processes, ../lifeline (each of the two ropes alone)
    F5   a dead engine takes the server with it     processes, ../supervisor (crash loop, breaker), storm
    F8   huge n                                     server/http (a_bomb_of_sequences_is_refused_at_once)
    F9   log-probabilities of whole contexts        limits, ../core (messages of a bounded size)
    F10  bombs in headers and bodies, slowloris     server/limits (statuses, time-outs), server/http (gzip), limits
    F11  templates                                  server/http (templates_of_clients_are_refused...)
    F13  pickle, sockets that anybody reaches       ../no_pickle, ../channels and ../wire (garbage), processes
    F16  special tokens in a user's text            server/http (special_tokens_in_messages_are_text)
    F17  features that are fine alone               matrix
    F18  routes without a key                       server/http (every_route_but_three_needs_a_key)
    F20  characters split over tokens               ../output_stream, server/http, server/clients, storm
    F21  stop strings split over tokens             the same
    F23  5xx under many streams                     limits
    F24  signals at any moment                      processes, storm (at its end), ../supervisor (for the group)
         a reader that is slow                      server/limits (cut off), limits (memory)
         no descriptors                             limits
         clocks that jump                           clocks
         malformed frames                           ../channels (garbage_in_every_socket...), ../core
         disk full while swapping                   storm, phase 1's test_offload (each call)

F6, F7, F12, F19, F22 and F25 belong to features that come later; F14 and F15 to inputs that are not offered.
`python -m phase4_scheduler.benchmark chaos drift` is the long run.
"""
