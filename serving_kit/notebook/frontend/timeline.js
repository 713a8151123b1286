// Which second of the server's clock it is between two snapshots.

const MOVING_STATES = ["ready", "draining", "stuck"];
const STALE_S = 3; // after which the charts stand still until the next snapshot

export class Timeline {
  snapshot = null;
  started = 0; // when the server started, on its own clock
  newest = 0; // when the snapshot was taken, on the server's clock
  receivedAt = 0;

  update(snapshot) {
    if (this.snapshot && snapshot.uptime_s < this.snapshot.uptime_s) this.started = 0; // another server
    // `second` is the server's clock rounded down, so the largest difference seen is the closest one.
    const last = snapshot.series.at(-1).second;
    this.started = Math.max(this.started, last - snapshot.uptime_s);
    this.newest = last + Math.min(1, Math.max(0, this.started + snapshot.uptime_s - last));
    this.snapshot = snapshot;
    this.receivedAt = performance.now();
  }

  // Seconds since the newest snapshot arrived.
  age() {
    return (performance.now() - this.receivedAt) / 1000;
  }

  // Whether time goes on for this server.
  runs(connected) {
    return connected && MOVING_STATES.includes(this.snapshot.state);
  }

  isFresh() {
    return this.age() < STALE_S;
  }
}
