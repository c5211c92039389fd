-- may end in: memory timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local f = function() end while true do local g = f f = function() return g end end end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
