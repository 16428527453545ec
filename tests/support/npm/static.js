// `node static.js KIND FOLDER PORT` serves a folder by one of the packages, as it is with no options.
const http = require('http')
const [kind, folder, port] = process.argv.slice(2)

const kinds = {
  // what express.static, Nest and most of npm's servers are made of: the package `send`
  'serve-static': () => {
    const files = require('serve-static')(folder)
    return (request, response) => files(request, response, require('finalhandler')(request, response))
  },
  // Vite's and SvelteKit's; with `dev` it reads the files for each request
  'sirv': () => require('sirv')(folder, { dev: true, etag: true }),
  // of the command `serve`
  'serve-handler': () => (request, response) =>
    require('serve-handler')(request, response, { public: folder }),
}

http.createServer(kinds[kind]()).listen(Number(port), '127.0.0.1')
