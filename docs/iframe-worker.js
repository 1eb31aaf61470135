// Browsers start no worker from a disk; the search then runs in a hidden frame. mkdocs-material knows this file by its name.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      const load = url => new Promise((resolve, reject) => {
        const script = inside.document.createElement("script")
        Object.assign(script, {src: new URL(url, location), onload: resolve, onerror: reject})
        inside.document.body.append(script)
      })
      inside.importScripts = (...urls) => Promise.all(urls.map(load))
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
      this.ready = load(url)
    }
    postMessage(data) {
      this.ready = this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data})))
    }
    terminate() { this.frame.remove() }
  }
}
