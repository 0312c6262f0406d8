"""The line of statistics that the server writes every few seconds if there is something to tell, and the last one."""

from __future__ import annotations

from phase4_scheduler.server.metrics import kv_usage
from phase4_scheduler.server.service import Service


def log_line(service: Service) -> str:
    """What the last seconds were like; "" when nothing happened in them."""
    stats, ledger, seen = service.stats, service.ledger, service.meter.summary()
    if not ledger.open_prompts and not seen["generated_tokens_per_second"] and not seen["qps"]:
        return ""
    swapped = f", {stats.swapped} swapped" if stats.swapped else ""
    return (
        f"{seen['qps']:.1f} requests/s, {seen['generated_tokens_per_second']:,.0f} tokens/s out, "
        f"{seen['prompt_tokens_per_second']:,.0f} in | "
        f"TTFT p50 {seen['ttft_p50'] * 1e3:.0f} p99 {seen['ttft_p99'] * 1e3:.0f} ms, "
        f"ITL p50 {seen['itl_p50'] * 1e3:.1f} p99 {seen['itl_p99'] * 1e3:.1f} ms | "
        f"{stats.running} running, {stats.waiting} waiting{swapped}, backlog {ledger.backlog_tokens:,.0f} tokens | "
        f"KV {kv_usage(stats):.0%}, {service.meter.totals.preemptions:.0f} preemptions | "
        f"{seen['batch_occupancy']:.1f} sequences a step, busy {seen['busy']:.0%}"
    )


def last_line(service: Service) -> str:
    """What became of all requests, for the end of the log: the books balance, or something was lost."""
    ledger = service.ledger
    ends = ", ".join(f"{count} {reason}" for reason, count in ledger.ends.items())
    accepted = "1 request was" if ledger.accepted == 1 else f"{ledger.accepted} requests were"
    return f"{accepted} accepted, {ends}"
